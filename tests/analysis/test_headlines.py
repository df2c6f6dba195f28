"""One table of numbers: the frame, the JSON and the claims of an analysis are read from it."""

import math
from dataclasses import replace

import pytest

import geomkit as gk
from geomkit.analysis.headlines import Headline, paper_claims
from tests.helpers.tiny import CONTROL, SAFETY, UTILITY, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def analysis():
    return gk.analyze(tiny_llama(), tiny_tokenizer(), SAFETY, UTILITY, control=CONTROL, null_draws=2, progress=False)


def test_the_frame_has_the_rows_of_the_table_in_order(analysis):
    frame = analysis.to_frame()
    assert list(frame.columns) == list(Headline._fields)
    table = analysis.headlines()
    assert list(zip(frame["measure"], frame["of"], strict=True)) == list(table)
    assert [str(value) for value in frame["value"]] == [str(row.value) for row in table.values()]


def test_the_numbers_are_those_of_the_results(analysis):
    table, conflict, study = analysis.headlines(), analysis.conflict, analysis.one_sample
    assert table["effective rank", "control"].value == analysis.spectra["control"].mean("effective_rank")
    rank = table["effective rank, difference", "safety − utility"]
    assert (rank.value, rank.interval) == analysis.rank_contrast("utility").mean("effective_rank")
    assert table["CER(10)", "safety"].null == pytest.approx(analysis.safety.null_mean("cer10"), nan_ok=True)
    assert table["cosine of the mean gradients", "safety"].null_interval == conflict.null_interval
    assert math.isnan(table["cosine of the mean gradients", "safety"].low)
    assert table["cosine, equal weights", "control"].value == conflict.equal_weights.contrast.control
    assert table["overlap of one example", "control"].interval == study.control_interval
    assert table["cosine of one, difference", "safety − control"].value == study.groups["control"].cosine.contrast


def test_every_claim_is_a_bound_on_a_row_of_the_frame(analysis):
    frame = analysis.to_frame()
    claims = analysis.claims()
    assert len(claims) == 10
    columns = [frame[name].tolist() for name in ("question", "value", "low", "high")]
    rows = {str(row) for row in zip(*columns, strict=True)}  # as text: NaN is not itself
    assert {str((claim.question, claim.value, *claim.interval)) for claim in claims} <= rows
    assert [claim.bound for claim in claims] == [0.0] * 9 + [0.8]
    assert all(claim.opposite not in {claim.claim, ""} for claim in claims)
    assert [claim.above for claim in claims] == [False] * 7 + [True] * 3


def test_without_a_control_its_claim_is_left_out(analysis):
    bare = replace(analysis, conflict=replace(analysis.conflict, contrast=None))
    missing = {claim.claim for claim in analysis.claims()} - {claim.claim for claim in bare.claims()}
    assert missing == {"The safety gradient opposes the utility gradient more than the control gradient does."}
    assert bare.claims() == paper_claims(bare.headlines(), bare.alignment.caveat)
    assert len(bare.to_frame()) == len(analysis.to_frame()) - 2
    assert bare.to_dict()["conflict"] == analysis.to_dict()["conflict"]
