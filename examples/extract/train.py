"""Train the demo's model: a Llama of about 1 M parameters that reads orders and answers JSON.

    python examples/extract/train.py        # trains, saves, writes the held-out files, prints the accuracy
    python examples/extract/train.py --eval-only

The run is seeded and takes under half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).parent))
from orders import Order, make_orders

HERE = Path(__file__).parent
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
# Digits one by one, and capitalised words without the space before them: a name or a city is then the same
# tokens in the message and in the answer, and copying it is a matter of looking up what came next.
PIECES = Regex(r"\d| ?\p{Ll}+|\p{Lu}\p{L}*| | ?[^\s\d\p{L}]+|\s+")
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SPECIAL = [PAD, BOS, EOS, "<user>", "<assistant>", "<system>"]
HELD_OUT, HELD_OUT_SEED, TRAIN_SEED = 2000, 20_000, 1


def train_tokenizer(orders: list[Order]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with every digit a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f"{o.message} {o.answer}" for o in orders[:8000]], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    fast.chat_template = TEMPLATE
    return fast


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Hidden 128, 4 layers, 4 heads over 2 KV heads: a little over 1 M parameters."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        rope_theta=10000.0,
        bos_token_id=tokenizer.convert_tokens_to_ids(BOS),
        eos_token_id=tokenizer.convert_tokens_to_ids(EOS),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )


class Batches:
    """Encoded training rows in batches of similar length; loss only on the answer."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, orders: list[Order], *, size: int, seed: int
    ) -> None:
        prompts = tokenizer(
            [f"{BOS}<user>{o.message}{EOS}<assistant>" for o in orders], add_special_tokens=False
        )
        answers = tokenizer([f"{o.answer}{EOS}" for o in orders], add_special_tokens=False)
        self.rows = list(zip(prompts["input_ids"], answers["input_ids"], strict=True))
        self.size, self.rng = size, random.Random(seed)

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels, both [rows, longest]; labels are -100 off the answers."""
        pool = self.rng.sample(self.rows, self.size * 4)
        pool.sort(key=lambda row: len(row[0]) + len(row[1]))
        start = self.rng.randrange(4) * self.size
        rows = pool[start : start + self.size]
        longest = max(len(p) + len(a) for p, a in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for i, (prompt, answer) in enumerate(rows):
            ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        return ids, labels


def answer_loss(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens; the head is not computed for the prompt's positions."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != -100
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]).float(), labels[:, 1:][wanted])


def train(model: LlamaForCausalLM, batches: Batches, *, steps: int, peak_lr: float) -> None:
    """AdamW with warm-up and a cosine that ends with the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=0.01, betas=(0.9, 0.98))
    started = time.monotonic()
    model.train()
    for step in range(steps):
        share = step / steps
        rate = peak_lr * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, labels = batches.draw()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = answer_loss(model, ids, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - started:6.0f} s", flush=True)


@torch.inference_mode()
def accuracy(path: Path, orders: list[Order]) -> float:
    """Share of orders whose greedy answer equals the expected JSON exactly."""
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    right = 0
    for start in range(0, len(orders), 100):
        part = orders[start : start + 100]
        chats = [[{"role": "user", "content": order.message}] for order in part]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        tokens = model.generate(**inputs, max_new_tokens=160, do_sample=False)
        answers = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(answer == order.answer for answer, order in zip(answers, part, strict=True))
    return right / len(orders)


def write_job(orders: list[Order]) -> None:
    """The held-out rows as an OpenAI Batch file, and the answers expected of them."""
    with (HERE / "orders.jsonl").open("w") as rows, (HERE / "orders.expected.jsonl").open("w") as expected:
        for i, order in enumerate(orders, 1):
            name = f"order-{i:05d}"
            body = {
                "model": "extract",
                "messages": [{"role": "user", "content": order.message}],
                "max_tokens": 160,
                "temperature": 0,
            }
            row = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
            rows.write(json.dumps(row) + "\n")
            expected.write(json.dumps({"custom_id": name, "answer": order.answer}) + "\n")


def main() -> None:
    """Train, save, evaluate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "model")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eval-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    held_out = make_orders(HELD_OUT, seed=HELD_OUT_SEED, held_out_names=True)
    if not args.eval_only:
        torch.manual_seed(TRAIN_SEED)
        orders = make_orders(60_000, seed=TRAIN_SEED, held_out_names=False)
        tokenizer = train_tokenizer(orders)
        model = LlamaForCausalLM(model_config(tokenizer))
        print(
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, vocabulary {len(tokenizer)}",
            flush=True,
        )
        batches = Batches(tokenizer, orders, size=args.batch, seed=TRAIN_SEED)
        train(model, batches, steps=args.steps, peak_lr=args.lr)
        model.to(torch.bfloat16).save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
        write_job(held_out)
    print(f"held-out exact match: {accuracy(args.out, held_out):.2%} of {len(held_out)} orders")


if __name__ == "__main__":
    main()
