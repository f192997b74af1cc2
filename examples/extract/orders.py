"""Order messages and the JSON of their fields: a seeded generator with disjoint training and held-out names.

A message names a customer, one to three products with quantities, a city and a date, in varied wording. The
answer is compact JSON with a fixed key order, the date as YYYY-MM-DD. Held-out messages use pairs of first
and last name that never occur in training, so a model has to copy what it reads.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from hashlib import blake2b

FIRST = (
    "Ada Alan Amir Anna Aria Boris Bruno Carla Cem Chloe Clara Daan Dana David Diego Elif Elena Emil "
    "Emma Erik Eva Farah Felix Fiona Gabor Greta Hana Hugo Ida Igor Ines Iris Ivan Jana Jonas Julia "
    "Kai Karin Kenji Lara Lena Leo Lin Lucia Luis Maja Marco Maria Mateo Mei Mila Mina Nadia Nina Nils "
    "Noah Nora Olga Omar Oscar Otto Paula Pavel Petra Priya Rafael Ravi Rosa Ruth Sara Sofia Stefan "
    "Tara Theo Tomas Uma Vera Victor Wanda Yara Yusuf Zoe"
).split()
LAST = (
    "Adler Almeida Bauer Becker Berg Bianchi Brown Castro Chen Conti Costa Diaz Dubois Eriksen Evans "
    "Farkas Fischer Fontaine Garcia Gruber Haas Hansen Hoffman Horvat Ito Ivanov Jansen Jensen Kaya "
    "Keller Khan Kim Klein Kovacs Kowalski Kumar Larsen Lehmann Lopez Lund Maier Marino Martin Mendes "
    "Meyer Moreau Moser Nagy Nakamura Novak Olsen Ortega Patel Petrov Popov Ramos Reyes Ricci Rossi "
    "Roux Santos Sato Schmidt Silva Simon Singh Smith Sousa Suzuki Tanaka Torres Vargas Vogel Wagner "
    "Walsh Weber Wolf Wong Yilmaz Zhang Ziegler"
).split()
PRODUCTS = (
    "copper wire;oak planks;steel bolts;paint rollers;garden hoses;work gloves;LED lamps;door hinges;"
    "drill bits;cement bags;wood screws;ceiling tiles;cable ties;saw blades;window seals;roof tiles;"
    "water pumps;pipe clamps;sand paper;tool boxes;safety vests;floor mats;glass jars;paper towels;"
    "coffee filters;office chairs;desk lamps;ink cartridges;note pads;ball pens;fire blankets;"
    "first aid kits;hand drills;ladder hooks;brass taps;tarpaulins;buckets;brooms;shovels;hammers;"
    "pliers;tape measures;extension cords;air filters;bearings;gaskets"
).split(";")
CITIES = (
    "Lyon Porto Graz Turin Leeds Ghent Basel Bergen Malaga Krakow Zagreb Lille Bonn Bremen Cork Delft "
    "Dresden Geneva Genoa Hamburg Izmir Kyoto Lagos Leipzig Lima Linz Lisbon Lugano Madrid Milan "
    "Munich Nantes Naples Nice Odense Osaka Oslo Padua Paris Parma Pisa Poznan Prague Quito Reims Riga "
    "Rouen Salzburg Seville Siena Sofia Split Tallinn Tampere Toulouse Trieste Turku Utrecht Verona "
    "Vienna Vilnius Warsaw Zurich"
).split()
MONTHS = ("January February March April May June July August September October November December").split()
WORDS = "one two three four five six seven eight nine ten eleven twelve".split()

OPENINGS = (
    "Hello,",
    "Hi there,",
    "Good morning,",
    "Dear team,",
    "Order:",
    "Hey,",
    "To whom it may concern,",
    "",
    "",
    "Please note:",
)
TEMPLATES = (
    "this is {name}. I would like {items}, delivered to {city} by {date}.",
    "please send {items} to {city}. Needed on {date}. Regards, {name}",
    "{name} here from {city}. Could we get {items} for {date}?",
    "we need {items} in {city} on {date}. Contact: {name}.",
    "ship to {city}, due {date}: {items}. Ordered by {name}.",
    "on {date} we are running a project in {city} and need {items}. Yours, {name}",
    "new order from {name}: {items}; place {city}; date {date}.",
    "could you arrange {items}? Address is in {city}, latest {date}. Thanks, {name}",
    "for {name}, {city}: {items}. Delivery {date} please.",
    "I'm {name} and I'd like to order {items}. Drop them off in {city}, {date}.",
)
REMARKS = (
    "The gate is open all day.",
    "Please call before you come.",
    "The last order was fine.",
    "No rush with the invoice.",
    "We pay on receipt.",
    "Same terms as before.",
    "Ring the bell twice.",
    "Let me know if this works.",
)


@dataclass(frozen=True, slots=True)
class Order:
    """A message and the JSON a reader should answer."""

    message: str
    answer: str


def held_out(first: str, last: str) -> bool:
    """Whether this pair of names is kept out of training (one pair in ten, by hash)."""
    return blake2b(f"{first} {last}".encode(), digest_size=2).digest()[0] % 10 == 0


def make_order(rng: random.Random, *, held_out_names: bool) -> Order:
    """One order with names from the training or from the held-out pairs."""
    first, last = rng.choice(FIRST), rng.choice(LAST)
    while held_out(first, last) != held_out_names:
        first, last = rng.choice(FIRST), rng.choice(LAST)
    items = [(p, rng.randint(1, 12) if rng.random() < 0.5 else rng.randint(1, 250)) for p in _products(rng)]
    city = rng.choice(CITIES)
    year, month, day = rng.randint(2024, 2029), rng.randint(1, 12), rng.randint(1, 28)
    body = rng.choice(TEMPLATES).format(
        name=f"{first} {last}", items=_list_items(rng, items), city=city, date=_date(rng, year, month, day)
    )
    parts = [rng.choice(OPENINGS), body] + ([rng.choice(REMARKS)] if rng.random() < 0.3 else [])
    message = " ".join(part for part in parts if part)
    fields = {
        "name": f"{first} {last}",
        "items": [{"product": product, "quantity": quantity} for product, quantity in items],
        "city": city,
        "date": f"{year:04d}-{month:02d}-{day:02d}",
    }
    return Order(message[0].upper() + message[1:], json.dumps(fields, separators=(",", ":")))


def make_orders(count: int, *, seed: int, held_out_names: bool) -> list[Order]:
    """`count` distinct orders; the same seed gives the same orders."""
    rng = random.Random(seed)
    orders: dict[str, Order] = {}
    while len(orders) < count:
        order = make_order(rng, held_out_names=held_out_names)
        orders.setdefault(order.message, order)
    return list(orders.values())


def _products(rng: random.Random) -> list[str]:
    return rng.sample(PRODUCTS, rng.choice((1, 1, 2, 2, 3)))


def _list_items(rng: random.Random, items: list[tuple[str, int]]) -> str:
    texts = [_item(rng, product, quantity) for product, quantity in items]
    if len(texts) == 1:
        return texts[0]
    return ", ".join(texts[:-1]) + rng.choice((" and ", ", and ", " plus ")) + texts[-1]


def _item(rng: random.Random, product: str, quantity: int) -> str:
    count = WORDS[quantity - 1] if quantity <= 12 and rng.random() < 0.4 else str(quantity)
    return rng.choice(
        (f"{count} {product}", f"{count} x {product}", f"{product} ({count})", f"{count} units of {product}")
    )


def _date(rng: random.Random, year: int, month: int, day: int) -> str:
    name = MONTHS[month - 1]
    return rng.choice(
        (
            f"{day} {name} {year}",
            f"{name} {day}, {year}",
            f"{year}-{month:02d}-{day:02d}",
            f"{day}.{month}.{year}",
            f"{day} {name[:3]} {year}",
        )
    )
