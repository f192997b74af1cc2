"""A script for vLLM, as its users write them. The tests run it with the import changed, and as it is under vLLM.

Usage: vllm_script.py MODEL OUTPUT
"""

import json
import sys

from vllm import LLM, SamplingParams, TokensPrompt  # type: ignore[import-not-found]

ORDERS = [
    "We need 235 door hinges in Vilnius on 12.7.2027. Contact: Erik Wagner.",
    "Dear team, could you arrange 235 x door hinges? Address is in Utrecht, latest 15.11.2029. Thanks, Stefan Nagy",
    "Hello, on 11 Oct 2024 we are running a project in Trieste and need 7 shovels and 4 units of water pumps.",
    "Please send 12 ladders to Porto by 3 May 2026.",
]


def described(output):
    """What a script may read of an output."""
    return {
        "prompt": output.prompt,
        "prompt_token_ids": list(output.prompt_token_ids),
        "finished": output.finished,
        "outputs": [
            {
                "index": o.index,
                "text": o.text,
                "token_ids": list(o.token_ids),
                "finish_reason": o.finish_reason,
                "stop_reason": o.stop_reason,
                "cumulative_logprob": o.cumulative_logprob,
                "logprobs": o.logprobs
                and [
                    [[token, p.logprob, p.rank, p.decoded_token] for token, p in position.items()]
                    for position in o.logprobs
                ],
            }
            for o in output.outputs
        ],
    }


def main(model, path):
    llm = LLM(
        model=model,
        dtype="float32",
        tensor_parallel_size=1,
        gpu_memory_utilization=0.5,
        max_model_len=400,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        seed=0,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        trust_remote_code=False,
    )
    tokenizer = llm.get_tokenizer()
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": order}], tokenize=False, add_generation_prompt=True
        )
        for order in ORDERS
    ]
    tokens = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    ids = [TokensPrompt(prompt_token_ids=t) for t in tokens]
    greedy = SamplingParams(temperature=0.0, max_tokens=160)
    cases = {
        "texts": llm.generate(texts, greedy),
        "one text": llm.generate(texts[0], greedy, use_tqdm=False),
        "dictionaries": llm.generate([{"prompt": text} for text in texts], greedy),
        "token ids": llm.generate(ids, sampling_params=greedy),
        "chat": llm.chat(
            [[{"role": "user", "content": order}] for order in ORDERS], sampling_params=greedy, use_tqdm=False
        ),
        "one chat": llm.chat(
            messages=[{"role": "user", "content": [{"type": "text", "text": ORDERS[1]}]}],
            sampling_params=greedy,
            add_generation_prompt=True,
        ),
        "continued": llm.chat(
            [
                {"role": "user", "content": ORDERS[2]},
                {"role": "assistant", "content": '{"city":"Tri'},
            ],
            greedy,
            add_generation_prompt=False,
            continue_final_message=True,
        ),
        "own template": llm.chat(
            [{"role": "user", "content": ORDERS[0]}],
            greedy,
            chat_template="{% for m in messages %}<s>{{ m.content }}{% endfor %}{{ extra }}",
            chat_template_kwargs={"extra": "\n"},
        ),
    }
    cases["recommended"] = llm.generate(texts)
    cases["recommended by chat"] = llm.chat([{"role": "user", "content": ORDERS[3]}])
    variants = {
        "defaults": SamplingParams(temperature=0),
        "no limit": SamplingParams(temperature=0, max_tokens=None),
        "endless": SamplingParams(temperature=0, max_tokens=None, ignore_eos=True),
        "at least": SamplingParams(temperature=0, max_tokens=150, min_tokens=140),
        "stop": SamplingParams(temperature=0, max_tokens=160, stop='","'),
        "stop kept": SamplingParams(
            temperature=0, max_tokens=160, stop=['","', "items"], include_stop_str_in_output=True
        ),
        "stop token": SamplingParams(temperature=0, max_tokens=160, stop_token_ids=[tokens[0][-3], 300, 301]),
        "stop token kept": SamplingParams(
            temperature=0,
            max_tokens=160,
            stop_token_ids=list(range(300, 400)),
            include_stop_str_in_output=True,
        ),
        "special tokens": SamplingParams(temperature=0, max_tokens=160, skip_special_tokens=False),
        "special tokens kept": SamplingParams(
            temperature=0, max_tokens=160, skip_special_tokens=False, include_stop_str_in_output=True
        ),
        "penalties": SamplingParams(
            temperature=0,
            max_tokens=80,
            repetition_penalty=1.2,
            presence_penalty=0.3,
            frequency_penalty=0.4,
        ),
        "logprobs": SamplingParams(temperature=0, max_tokens=40, logprobs=3),
        "chosen logprobs": SamplingParams(temperature=0, max_tokens=20, logprobs=0),
        "several": SamplingParams(temperature=0.5, top_k=1, max_tokens=20, n=2),
        "nearly greedy": SamplingParams(
            temperature=0.7, top_k=1, top_p=0.9, min_p=0.1, max_tokens=160, seed=3
        ),
        "no text": SamplingParams(temperature=0, max_tokens=20, detokenize=False),
        "neutral": SamplingParams(
            temperature=0,
            max_tokens=60,
            bad_words=[],
            logit_bias=None,
            allowed_token_ids=None,
            prompt_logprobs=None,
            spaces_between_special_tokens=True,
            seed=-1,
            top_k=-1,
        ),
    }
    for name, params in variants.items():
        cases[name] = llm.generate(texts, params)
    cases["one each"] = llm.generate(texts, list(variants.values())[: len(texts)])
    default = llm.get_default_sampling_params()
    told = {
        name: getattr(default, name) for name in ("temperature", "top_k", "repetition_penalty", "max_tokens")
    }
    with open(path, "w") as file:
        answers = {name: [described(o) for o in outputs] for name, outputs in cases.items()}
        json.dump({"recommendation": told, "answers": answers}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
