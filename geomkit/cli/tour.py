"""The command ``geomkit tour``: every stage once, on the organism."""

from pathlib import Path

from geomkit.cli.options import Json, Out, Seed
from geomkit.cli.outputs import check_writable, show_analysis, write_results
from geomkit.cli.start import prepare
from geomkit.utils.terminal import show_table


def tour(out: Out = Path("geomkit-tour"), json_file: Json = None, seed: Seed = 0) -> None:
    """Run every stage once on the shipped organism, and write report.html."""
    prepare(threads=1)
    from geomkit.experiments.tour import run_tour

    check_writable(out, json_file and json_file.parent)
    result = run_tour(seed=seed)
    show_table(result.to_frame(), "What fine-tuning did, with and without SPF")
    show_analysis(result.analysis, "What the gradients look like")
    write_results(out, json_file, result)
