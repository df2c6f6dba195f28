"""A saved file that is damaged, or made up by somebody who knows the format, is one line of error or a whole result."""

import copy
import gzip
import hashlib
import json
from contextlib import suppress

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import geomkit as gk
from geomkit.errors import DataError, GeomkitError
from geomkit.experiments.results import load_results
from geomkit.svd.subspaces import load_subspace
from geomkit.training.compare import compare_evaluations
from geomkit.training.evaluation import load_evaluation
from geomkit.utils import saved_files
from tests.helpers.saves import every_form

# The same examples in every run; without the explanation of a failure, which takes minutes.
BOUNDED = settings(deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate, Phase.shrink))

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**65) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def rewritten(folder, change, kind="gradients"):
    """Change a document as somebody would who knows the format: with a checksum that fits."""
    path = folder / f"{kind}.json"
    document = json.loads(path.read_text())
    del document["checksum"]
    change(document)
    path.write_text(json.dumps(document | {"checksum": saved_files.checksum(document)}))


def places(value, path=()):
    """Yield the path of every value inside a JSON document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield (*path, key)
        yield from places(item, (*path, key))


def replaced(document, path, value):
    *outer, last = path
    inside = document
    for key in outer:
        inside = inside[key]
    if value is _GONE:
        del inside[last]
    else:
        inside[last] = value


_GONE = object()


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saves")
    every_form().save(folder)
    gk.subspace(every_form(), energy=0.9, side="both").save(folder)
    documents = {kind: json.loads((folder / f"{kind}.json").read_text()) for kind in ("gradients", "subspace")}
    return folder, documents


@settings(BOUNDED, max_examples=150)
@given(data=st.data())
def test_a_changed_document_is_refused_or_a_whole_result(saves, data):
    folder, documents = saves
    kind = data.draw(st.sampled_from(sorted(documents)))
    document = copy.deepcopy(documents[kind])
    del document["checksum"]
    path = data.draw(st.sampled_from(list(places(document))))
    replaced(document, path, data.draw(JSON | st.just(_GONE)))
    (folder / f"{kind}.json").write_text(json.dumps(document | {"checksum": saved_files.checksum(document)}))
    try:
        result = (gk.load_gradients if kind == "gradients" else load_subspace)(folder)
    except GeomkitError:
        return
    assert type(result).__name__ == {"gradients": "GradientSet", "subspace": "Subspace"}[kind]
    result.to_frame()
    assert str(result)
    assert "<table" in result._repr_html_()


@settings(BOUNDED, max_examples=60)
@given(data=st.data())
def test_other_tensors_with_a_hash_that_fits_are_refused_or_a_whole_result(saves, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("tensors")
    every_form().save(folder)
    [path] = folder.glob("*.safetensors")
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = data.draw(st.sampled_from(sorted(tensors)))
    change = data.draw(st.sampled_from(["shorter", "longer", "matrix", "dtype", "values"]))
    flat = tensors[name]
    tensors[name] = {
        "shorter": flat[:-1], "longer": torch.cat([flat, flat[:1]]), "matrix": flat[None],
        "dtype": flat.to(torch.int32), "values": flat + 7,
    }[change].contiguous()  # fmt: skip
    save_file(tensors, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rewritten(folder, lambda document: document["numbers"].update(sha256=digest))
    if change == "values" and "indices" not in name:
        assert gk.load_gradients(folder)
        return
    with pytest.raises(DataError, match="as geomkit wrote them, found"):
        gk.load_gradients(folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "gradients.json", "", "a/b.safetensors"])
def test_numbers_are_read_inside_the_folder_only(tmp_path, name):
    every_form().save(tmp_path / "inside")
    [path] = (tmp_path / "inside").glob("*.safetensors")
    (tmp_path / "other.safetensors").write_bytes(path.read_bytes())
    rewritten(tmp_path / "inside", lambda document: document["numbers"].update(file=name))
    with pytest.raises(DataError, match="found the name"):
        gk.load_gradients(tmp_path / "inside")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda d: d.pop("numbers"), "JSON without content or the name of its numbers"),
        (lambda d: d.update(content=None), "JSON without content"),
        (lambda d: d["content"]["layers"]["items"]["b"]["tensor"].update(shape=[-1, 128]), "is no shape"),
        (lambda d: d["content"]["layers"]["items"]["b"]["tensor"].update(shape=[2**70]), "is invalid for the"),
        (lambda d: d["content"].update(examples="3"), "GradientSet.examples of another type"),
        (lambda d: d["content"]["layers"]["items"]["table"].update(size=1), "tensors of 'table' that do not fit"),
        (lambda d: d["content"]["layers"]["items"].pop("b"), "numbers that the JSON does not name"),
        (lambda d: d.update(content=d["content"]["coverage"]), "Coverage in place of GradientSet"),
    ],
)
def test_no_value_of_a_header_is_trusted(tmp_path, change, found):
    every_form().save(tmp_path)
    rewritten(tmp_path, change)
    with pytest.raises(DataError, match=found):
        gk.load_gradients(tmp_path)


@pytest.fixture(scope="module")
def records():
    return load_results("limits").records[:2]


@settings(BOUNDED, max_examples=80)
@given(data=st.data())
def test_damaged_results_of_a_grid_are_refused_or_shown(records, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("results") / "x.jsonl.gz"
    lines = [{"format": 1, "name": "x"}, *copy.deepcopy(records)]
    where = data.draw(st.sampled_from(list(places(lines))))
    replaced(lines, where, data.draw(JSON | st.just(_GONE)))
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    try:
        results = load_results(path)
    except DataError:
        return
    results.to_frame()
    assert str(results)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    from tests.helpers.tiny import SAFETY, tiny_llama, tiny_tokenizer

    path = tmp_path_factory.mktemp("evaluation") / "e.json"
    gk.evaluate(tiny_llama(), tiny_tokenizer(), SAFETY, max_new_tokens=2, progress=False).save(path)
    return json.loads(path.read_text())


@settings(BOUNDED, max_examples=80)
@given(data=st.data())
def test_a_damaged_evaluation_is_refused_or_shown(evaluation, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("evaluation") / "e.json"
    changed = copy.deepcopy(evaluation)
    where = data.draw(st.sampled_from(list(places(changed))))
    replaced(changed, where, data.draw(JSON | st.just(_GONE)))
    path.write_text(json.dumps(changed))
    try:
        found = load_evaluation(path)
    except DataError:
        return
    found.to_frame()
    assert str(found)
    with suppress(DataError):  # responses that are not those of an evaluation
        compare_evaluations({"a": found, "b": found})


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b'{"a":'])
def test_foreign_files_are_one_line(tmp_path, content):
    places = {
        "gradients.json": gk.load_gradients, "subspace.json": load_subspace, "e.json": load_evaluation,
    }  # fmt: skip
    for name, load in places.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError):
            load(tmp_path / name if name == "e.json" else tmp_path)
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(content))
    with pytest.raises(DataError):
        load_results(tmp_path / "r.jsonl.gz")


def test_a_circle_of_links_and_a_folder_in_place_of_a_file_are_one_line(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for load in (gk.load_gradients, load_subspace, load_evaluation, load_results, gk.load_examples):
        with pytest.raises(DataError):
            load(tmp_path / "a")
    with pytest.raises(DataError):
        gk.load_model(tmp_path / "a")
    for name in ("gradients.json", "subspace.json"):
        (tmp_path / name).mkdir()
    for load in (gk.load_gradients, load_subspace, load_evaluation, load_results, gk.load_examples):
        with pytest.raises(DataError):
            load(tmp_path)
