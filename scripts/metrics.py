"""Print the table of docs/metrics.md, which lists what `retrofit measure` always measures.

python scripts/metrics.py
"""

from retrofit.report.metrics import METRICS

BETTER = {"less": "less", "more": "more", None: "neither"}


def table() -> str:
    header = ["key in JSON", "name", "what it is", "better", "source"]
    rows = [
        [f"`{key}`", metric.full_label, metric.meaning, BETTER[metric.better], metric.source]
        for key, metric in METRICS.items()
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in [header, ["---"] * len(header), *rows])


if __name__ == "__main__":
    print(table(), end="")
