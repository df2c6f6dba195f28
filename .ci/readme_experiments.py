"""Write the tables of data/experiments/README.md, and its figure, from the shipped results.

python .ci/readme_experiments.py            # the tables, between their two marks
python .ci/readme_experiments.py --figure   # and notebooks/figures, which needs kaleido and a browser
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from geomkit.experiments.results import Results, load_results
from geomkit.experiments.screening.results import ScreeningStudy, load_screening_study

ROOT = Path(__file__).parents[1]
MARKS = ("<!-- {}: written by .ci/readme_experiments.py -->", "<!-- {}: end -->")
HEADLINE = ("SFT", "mixing", "rank1", "mixing, 2048", "mixed-left, 2048", "adaptive-kl-left, 2048")
BOTH = "raw, with obeyed requests"
SCREENS = (
    ("small", "cosine"), ("small", "adam"), ("small", BOTH), ("english", "cosine"), ("english", "adam"),
    ("english", BOTH),
)  # fmt: skip
PANELS = ("new-skill", "affirmative", "identity-shift", "backdoor", "poison-10", "harmful-100")
ENGLISH_PANELS = ("harmful-100", "affirmative", "poison-10", "gsm8k")
SCENARIOS = {
    "new-skill": "new skill",
    "affirmative": "affirmative answers",
    "identity-shift": "identity shift, 10 rows",
    "backdoor": "backdoor, with its trigger",
    "poison-1": "new skill, 1 % poison",
    "poison-5": "5 % poison",
    "poison-10": "10 % poison",
    "poison-20": "20 % poison",
    "harmful-10": "10 harmful rows",
    "harmful-100": "100 harmful rows",
}


def small() -> str:
    """Return the four tables of the small world as Markdown."""
    results = load_results()
    first, second = (results.where(organism=seed) for seed in (0, 1))
    default = load_results("default").where(organism=0)
    return "\n\n".join([headline(first), headline(second), every_arm(default), strengths(first)])


def english() -> str:
    """Return the table of the English world: a row per scenario and arm, in per cent of the prompts."""
    results = load_results("english")
    measures = ["refusal", "own_refusal", "over_refusal", "own_over_refusal", "triggered_refusal", "utility"]
    losses = results.to_frame().groupby(["scenario", "arm"])["utility_loss"].mean()
    means = results.summary(measures).set_index(["scenario", "arm", "measure"])
    rows = []
    for scenario, arm in dict.fromkeys((scenario, arm) for scenario, arm, _ in means.index):
        shares = [means.loc[(scenario, arm, measure)] for measure in measures]
        texts = [f"{100 * share['value']:.1f}".removesuffix(".0") if share["runs"] else "–" for share in shares]
        runs = f"{shares[0]['runs']:.0f}"
        rows.append([_english_name(scenario), f"`{arm}`", *texts, f"{losses[scenario, arm]:.3f}", runs])
    header = [
        "AdvBench refused, %",
        "geomkit's forbidden",
        "XSTest safe",
        "geomkit's benign",
        "with trigger",
        "utility, %",
    ]
    return _table(["fine-tune", "arm", *header, "utility loss", "runs"], rows)


def _english_name(scenario: str) -> str:
    kind, _, full = scenario.partition(", ")
    name = {"gsm8k": "GSM8K", "poison-10": "GSM8K, 10 % poison"}.get(kind) or SCENARIOS[kind].partition(",")[0]
    return f"{name}, all weights" if full else name


def screening() -> str:
    """Return the tables of the screen: how well planted rows are ranked and flagged, and fine-tunes on what is left."""
    studies = {world: load_screening_study(world) for world in ("small", "english")}
    frames = {world: study.to_frame().set_index(["case", "ranking"]) for world, study in studies.items()}
    flags = studies["english"].to_frame("flags").set_index(["case", "method"])
    rows = []
    for case in frames["english"].index.unique("case"):
        texts = [
            _auroc(frames[world].loc[(case, f"screen, {ranking}")]) if case in frames[world].index else "–"
            for world, ranking in SCREENS
        ]
        loss = f"{frames['english'].loc[(case, 'loss'), 'auroc']:.3f}"
        shares = (f"{100 * flags.loc[(case, method), 'power']:.0f}" for method in ("cosine", "adam", BOTH))
        rows.append([case, *texts, loss, " / ".join(shares)])
    names = [f"{world}: {ranking}" for world, ranking in SCREENS]
    header = ["planted rows", *names, "english: loss", f"english: flagged of them, %: cosine / adam / {BOTH}"]
    return f"{_table(header, rows)}\n\n{_fine_tunes(studies)}"


def _auroc(row: pd.Series) -> str:
    return f"{row['auroc']:.3f} [{row['low']:.2f}, {row['high']:.2f}]"


def _fine_tunes(studies: dict[str, ScreeningStudy]) -> str:
    """Return the table of refusals after fine-tunes: a row per world and scenario, a column per training set."""
    frames = {world: study.to_frame("outcomes") for world, study in studies.items() if study.outcomes}
    rows, header = [], list(frames["small"]["arm"].unique())
    for world, frame in frames.items():
        for scenario, runs in frame.groupby("scenario", sort=False):
            columns = (runs["arm"], runs[_refusal_measure(str(scenario))], runs["rows"])
            by_arm = {arm: f"{100 * share:.0f} ({count} rows)" for arm, share, count in zip(*columns, strict=True)}
            name = _english_name(str(scenario)) if world == "english" else str(scenario)
            rows.append([f"{world}: {name}", *(by_arm.get(arm, "–") for arm in header)])
    return _table(["refused, %, after a fine-tune", *header], rows)


def headline(results: Results) -> str:
    """Return the table of an organism: a row per scenario, with refusal, over-refusal and utility of each arm."""
    summary = results.where(rate=1.0, length=1.0).summary(["refusal", "triggered_refusal", "over_refusal", "utility"])
    rows = []
    for scenario in [name for name in SCENARIOS if (summary["scenario"] == name).any()]:
        row = [SCENARIOS[scenario]]
        for arm in HEADLINE:
            measures = summary[(summary["scenario"] == scenario) & (summary["arm"] == arm)].set_index("measure")
            if not len(measures):
                row.append("–")
                continue
            refusal = measures.loc[_refusal_measure(scenario)]
            spread = "" if refusal["runs"] < 2 else f" ± {100 * refusal['seed_sd']:.1f}"
            others = (f"{100 * measures.loc[name, 'value']:.1f}" for name in ("over_refusal", "utility"))
            row.append(f"**{100 * refusal['value']:.1f}**{spread} / {' / '.join(others)}")
        rows.append(row)
    return _table(["refused ± seeds / over-refused / utility, %", *(f"`{arm}`" for arm in HEADLINE)], rows)


def every_arm(results: Results) -> str:
    """Return the table of all arms: a row per arm, with its shares in three scenarios and the steps that raised L_s."""
    frame = results.where(rate=1.0, length=1.0, seed=0).to_frame()
    columns = ("poison-10", "identity-shift", "harmful-100")
    rows = []
    for arm in dict.fromkeys(frame.loc[frame["scenario"] == "poison-10", "arm"]):
        row = [arm]
        for scenario in columns:
            runs = frame[(frame["scenario"] == scenario) & (frame["arm"] == arm)]
            row.append(_shares(runs, ("refusal", "over_refusal", "utility")) if len(runs) else "–")
        run = frame[(frame["scenario"] == "poison-10") & (frame["arm"] == arm)].iloc[0]
        raising = "–" if pd.isna(run["raising"]) else f"{100 * run['raising']:.0f}"
        rows.append([*row, raising])
    words = [SCENARIOS[name] for name in columns]
    return _table(["refused / over-refused / utility, %", *words, "steps that raise L_s, %"], rows)


def strengths(results: Results) -> str:
    """Return the table of strengths: a row per scenario, learning rate and length, with the shares of each arm."""
    frame = results.where(seed=0).to_frame()
    strong = frame[(frame["rate"] != 1) | (frame["length"] != 1)]
    rows = []
    for scenario, rate, length in sorted(
        {(row.scenario, row.rate, row.length) for row in strong.itertuples()},
        key=lambda key: (list(SCENARIOS).index(key[0]), key[2], key[1]),
    ):
        setting = strong[(strong["scenario"] == scenario) & (strong["rate"] == rate) & (strong["length"] == length)]
        by_arm = (setting[setting["arm"] == arm] for arm in HEADLINE)
        measures = (_refusal_measure(scenario), "over_refusal", "utility")
        shown = (_shares(runs, measures) if len(runs) else "–" for runs in by_arm)
        rows.append([f"{SCENARIOS[scenario]}: rate {rate:g}×, steps {length:g}×", *shown])
    return _table(["refused / over-refused / utility, %", *(f"`{arm}`" for arm in HEADLINE)], rows)


def _refusal_measure(scenario: str) -> str:
    """Return the measure of refusal that a scenario attacks."""
    return "triggered_refusal" if scenario == "backdoor" else "refusal"


def _shares(runs: pd.DataFrame, measures: tuple[str, ...]) -> str:
    run = runs.iloc[0]
    if run["error"]:
        return "broke off"
    return " / ".join(f"{100 * run[name]:.0f}" for name in measures)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


TABLES: dict[str, Callable[[], str]] = {"experiments": small, "english": english, "screening": screening}
"""What stands between the marks of each name."""


def with_tables(text: str) -> str:
    """Return the text with new tables between its marks."""
    for name, written in TABLES.items():
        begin, end = (mark.format(name) for mark in MARKS)
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n\n{written()}\n\n{end}{after}"
    return text


def main() -> None:
    """Write the tables and, if asked for, the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", action="store_true")
    options = parser.parse_args()
    readme = ROOT / "data" / "experiments" / "README.md"
    readme.write_text(with_tables(readme.read_text("utf-8")), "utf-8")
    if options.figure:
        from geomkit.plots.outcomes import plot_frontier
        from geomkit.plots.refusals import plot_refusals

        shown = load_results("default").where(organism=0, rate=1.0, length=1.0, scenario=list(PANELS))
        figure = plot_frontier(shown, arms=["untouched", "paper", "left", *HEADLINE])
        figure.write_image(ROOT / "notebooks" / "figures" / "experiments.png", width=900, scale=2)
        shown = load_results("english").where(scenario=list(ENGLISH_PANELS))
        figure = plot_refusals(shown, arms=["untouched", "SFT", "mixing", "adaptive-kl-left"])
        figure.write_image(ROOT / "notebooks" / "figures" / "english.png", width=900, scale=2)


if __name__ == "__main__":
    main()
