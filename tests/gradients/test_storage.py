"""A save is read back bit for bit, or refused; whatever interrupts one, the old result or the new is there."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import geomkit.utils.files as files
import geomkit.utils.saved_files as folders
from geomkit.collection.collect import collect_gradients
from geomkit.errors import DataError
from geomkit.gradients.dense import DenseGradient
from geomkit.gradients.factored import FactoredGradient
from geomkit.gradients.gradient_set import Coverage, GradientSet
from geomkit.gradients.layer_gradient import LayerGradient
from geomkit.gradients.provenance import provenance_of
from geomkit.gradients.storage import load_gradients
from geomkit.inputs.tokens import encode
from geomkit.svd.subspaces import LayerSubspace, Subspace, load_subspace, subspace
from tests.helpers.saves import every_form, identical, names, some
from tests.helpers.tiny import SAFETY, tiny_llama, tiny_tokenizer


def origin(model=None, **changes):
    rows = encode(tiny_tokenizer(), SAFETY)
    return provenance_of(model or tiny_llama(), rows, **({"reduction": "example", "seed": 3} | changes))


# --------------------------------------------------------------------------------------------------------- round trips


def test_every_form_with_samples_coverage_and_provenance_comes_back_bit_for_bit(tmp_path):
    gradients = every_form()
    assert gradients.save(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    found = load_gradients(str(tmp_path / "new" / "folder"))
    assert identical(gradients, found)
    assert not identical(gradients, every_form(seed=1))
    assert str(found) == str(gradients)
    assert found.coverage.notes == {"w": "its module is called 2 times"}
    assert found["w"].tokens == 3 + 5 + 5


def test_a_subspace_comes_back_bit_for_bit(tmp_path):
    with pytest.warns(UserWarning, match="expected rank 4"):
        kept = subspace(every_form(), rank=4, side="right")
    kept.save(tmp_path)
    assert identical(kept, load_subspace(tmp_path))
    with pytest.warns(UserWarning, match="expected rank 4"):
        pairs = subspace(every_form(), rank=4, side="both", method="randomized")
    pairs.save(tmp_path)
    assert identical(pairs, load_subspace(tmp_path))
    empty = Subspace("left", {"w": LayerSubspace(torch.zeros(5, 0), np.zeros(0), 0.0, 0)})
    empty.save(tmp_path)
    assert identical(empty, load_subspace(tmp_path))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 4), max_size=4),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
)
def test_any_lengths_types_losses_and_names_come_back(tmp_path_factory, lengths, dtype, loss, name):
    def one(seed, tokens):
        factors = (some(seed, tokens, 5, dtype=dtype), some(seed, tokens, 3, dtype=torch.float32))
        return GradientSet({name: FactoredGradient(*factors)}, 0.5, 1, tokens, Coverage({name: 15}, {}, {}))

    samples = tuple(one(*pair) for pair in enumerate(lengths))
    gradients = replace(one(9, 2), loss=loss, samples=samples)
    folder = tmp_path_factory.mktemp("any")
    gradients.save(folder)
    found = load_gradients(folder)
    assert identical(replace(gradients, loss=0.0), replace(found, loss=0.0))
    assert np.float64(loss).tobytes() == np.float64(found.loss).tobytes() or (loss != loss and found.loss != found.loss)


@pytest.mark.parametrize("tied", [True, False])
def test_what_was_collected_comes_back_and_belongs_to_its_model(tmp_path, tied):
    model = tiny_llama(tied=tied)
    gradients = collect_gradients(model, tiny_tokenizer(), SAFETY, per_sample=True, progress=False)
    gradients = replace(gradients, provenance=gradients.provenance or origin(model))
    gradients.save(tmp_path)
    assert identical(gradients, load_gradients(tmp_path, model=model))


def test_an_empty_set_comes_back(tmp_path):
    empty = GradientSet({}, 0.0, 0, 0, Coverage({}, {}, {}))
    empty.save(tmp_path)
    assert identical(empty, load_gradients(tmp_path))


def test_tensors_of_one_repeated_entry_come_back(tmp_path):
    layers = {str(shape): DenseGradient(torch.ones(()).expand(shape), 1) for shape in ((), (1,), (3,), (2, 3), (0,))}
    GradientSet(layers, 0.0, 1, 1, Coverage({}, {}, {})).save(tmp_path)
    assert identical(layers, load_gradients(tmp_path).layers)


def test_odd_bits_of_a_float_are_kept(tmp_path):
    odd = torch.tensor([float("nan"), -0.0, float("-inf"), 1e-45]).view(torch.int32)
    odd[0] += 7
    gradients = replace(every_form(), layers={"w": DenseGradient(odd.view(torch.float32), 1)}, samples=())
    gradients.save(tmp_path)
    assert torch.equal(load_gradients(tmp_path)["w"].dense().view(torch.int32), odd)


def test_two_saves_of_one_result_write_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        every_form().save(tmp_path / folder)
    assert names(tmp_path / "a") == names(tmp_path / "b")
    for name in names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_other_libraries_read_the_numbers_and_the_facts(tmp_path):
    gradients = every_form()
    gradients.save(tmp_path)
    document = json.loads((tmp_path / "gradients.json").read_text())
    assert document["kind"] == "gradients"
    assert document["content"]["provenance"]["weights"] == gradients.provenance.weights
    tensors = load_file(tmp_path / document["numbers"]["file"])
    lefts = [gradients["head"].left, *(sample["head"].left for sample in gradients.samples)]
    assert torch.equal(tensors["head/left/float32"], torch.cat(lefts).flatten())
    # Every part of every gradient, once.
    assert len(tensors) == 11
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in tensors.values())


def test_changing_what_was_loaded_changes_no_file(tmp_path):
    gradients = every_form()
    gradients.save(tmp_path)
    load_gradients(tmp_path)["b"].tensor.zero_()
    found = load_gradients(tmp_path)
    assert identical(gradients, found)
    # What was loaded can be saved over itself.
    found.save(tmp_path)
    assert identical(gradients, found)
    assert identical(gradients, load_gradients(tmp_path))


def test_views_into_shared_tensors_are_written_once_and_without_a_copy_of_all(tmp_path):
    batch = some(0, 64, 1024, 64)
    strided = some(1, 64, 64, 1024).transpose(1, 2)
    samples = tuple(
        GradientSet(
            {"w": FactoredGradient(batch[i], strided[i])}, 0.5, 1, 1024, Coverage({"w": 4096}, {}, {}), provenance=None
        )
        for i in range(64)
    )
    gradients = GradientSet({"w": DenseGradient(some(2, 64, 64), 9)}, 0.5, 64, 9, Coverage({}, {}, {}), samples)
    sizes = []
    draft_write = files.Draft.write

    def watched(draft, content):
        sizes.append(memoryview(content).nbytes)
        draft_write(draft, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.Draft, "write", watched)
        gradients.save(tmp_path)
    [numbers] = tmp_path.glob("*.safetensors")
    assert numbers.stat().st_size < batch.nbytes + strided.nbytes + 64 * 64 * 4 + 1000
    assert max(sizes) == batch[0].nbytes
    assert identical(gradients, load_gradients(tmp_path))


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def saved(tmp_path):
    every_form().save(tmp_path / "save")
    return tmp_path / "save"


def rewritten(folder, change, part="content"):
    """Change the JSON as somebody would who knows the format: with a checksum that fits."""
    path = folder / "gradients.json"
    document = json.loads(path.read_text())
    del document["checksum"]
    change(document[part])
    document["checksum"] = folders.checksum(document)
    path.write_text(json.dumps(document))


def numbers_of(folder):
    [path] = folder.glob("*.safetensors")
    return path


def replaced_numbers(folder, change):
    """Write other tensors with a hash that fits."""
    path = numbers_of(folder)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rewritten(folder, lambda numbers: numbers.update(sha256=digest), part="numbers")


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(DataError, match=r"expected gradients.json in .*nowhere, found none; save there first"):
        load_gradients(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"expected subspace.json in .*, found none; save there first"):
        load_subspace(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="found none"):
        load_gradients(tmp_path / "file")
    for place in ("file", "file/inside"):
        with pytest.raises(DataError, match=r"expected a folder to save to at .*, found a file; choose another name"):
            every_form().save(tmp_path / place)
    assert names(tmp_path) == ["file"]


def test_the_wrong_kind_names_the_right_function(saved):
    with pytest.raises(DataError, match=r"expected subspace.json in .*, found gradients.json; .* load what is there"):
        load_subspace(saved)
    (saved / "gradients.json").rename(saved / "subspace.json")
    with pytest.raises(DataError, match=r"expected subspace in .*, found gradients; load it with geomkit.load_gradien"):
        load_subspace(saved)


def test_both_kinds_fit_in_one_folder_with_other_files(tmp_path):
    others = ("config.json", "model.safetensors", ".gradients.json", "gradients-old.safetensors", "gradients.txt")
    for name in others:
        (tmp_path / name).write_text(name)
    gradients = every_form()
    kept = subspace(gradients, energy=0.9)
    for _ in range(2):
        gradients.save(tmp_path)
        kept.save(tmp_path)
    assert identical(gradients, load_gradients(tmp_path))
    assert identical(kept, load_subspace(tmp_path))
    assert all((tmp_path / name).read_text() == name for name in others)
    assert len(names(tmp_path)) == len(others) + 4


def test_a_later_format_is_refused_before_anything_else(saved):
    path = saved / "gradients.json"
    document = json.loads(path.read_text()) | {"format": 2, "geomkit": "9.9"}
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"expected format 1 in .*, found 2, of a later geomkit; update geomkit"):
        load_gradients(saved)


def test_a_json_that_is_cut_short_or_changed_is_refused(saved):
    path = saved / "gradients.json"
    text = path.read_text()
    for cut in (0, 1, len(text) // 2, len(text) - 3):
        path.write_text(text[:cut])
        with pytest.raises(
            DataError, match=r"gradients.json and its numbers .*, found JSON that cannot be read .*copy"
        ):
            load_gradients(saved)
    path.write_text(text.replace('"examples": 3', '"examples": 4'))
    with pytest.raises(DataError, match="found JSON that is not what its checksum promises"):
        load_gradients(saved)
    path.write_bytes(b"\xff\xfe" + text.encode())
    with pytest.raises(DataError, match=r"found JSON that cannot be read \('utf-8' codec"):
        load_gradients(saved)
    for other in ("[]", "{}", "3", '{"kind": "gradients"}', "[" * 10_000):
        path.write_text(other)
        with pytest.raises(DataError, match="cannot be read"):
            load_gradients(saved)


def test_numbers_that_are_cut_short_or_changed_are_refused(saved):
    path = numbers_of(saved)
    content = path.read_bytes()
    for broken in (b"", content[:7], content[:-1], content + b"\0", content[:-1] + bytes([content[-1] ^ 1])):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"found gradients-.*.safetensors with the hash .*, not .*different saves"):
            load_gradients(saved)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flip")
    gradients = every_form()
    gradients.save(folder)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        found = load_gradients(folder)
    except DataError:
        return
    assert identical(gradients, found)


def test_numbers_of_another_save_are_refused(saved, tmp_path):
    every_form(seed=5).save(tmp_path / "other")
    path = numbers_of(saved)
    path.write_bytes(numbers_of(tmp_path / "other").read_bytes())
    with pytest.raises(DataError, match="with the hash"):
        load_gradients(saved)
    path.unlink()
    with pytest.raises(DataError, match=r"found no file gradients-.*; .* copy both files again"):
        load_gradients(saved)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda t: t.pop("head/left/float32"), "KeyError: 'head/left/float32'"),
        (lambda t: t.update({"head/left/float32": t["head/left/float32"][:2]}), "ValueError: shape .* is invalid"),
    ],
)
def test_tensors_that_do_not_fit_the_json_are_refused(saved, change, found):
    replaced_numbers(saved, change)
    with pytest.raises(DataError, match=f"expected .*gradients.json .* as geomkit wrote them, found {found}"):
        load_gradients(saved)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda content: content["layers"]["items"]["head"].update(type="Other"), "KeyError: 'Other'"),
        (lambda content: content["layers"]["items"]["head"].pop("left"), "missing 1 required .* argument: 'left'"),
        (lambda content: content["layers"]["items"]["w"].update(parts=[]), "expected parts of one shape"),
        (lambda content: content["provenance"].update(mood="good"), "unexpected keyword argument 'mood'"),
        (lambda content: content["coverage"].pop("type"), "KeyError: 'type'"),
    ],
)
def test_a_json_of_other_types_and_fields_is_refused(saved, change, found):
    rewritten(saved, change)
    with pytest.raises(DataError, match=f"expected .*gradients.json .* as geomkit wrote them, found .*{found}"):
        load_gradients(saved)


def test_what_cannot_be_saved_is_refused_and_leaves_the_old_save(tmp_path):
    old = every_form()
    old.save(tmp_path)
    before = names(tmp_path)

    class Foreign(LayerGradient):
        shape = (4,)
        dense = add_to = dot = scaled = take = matmul = rmatmul = factors = tensors = _squared_norm = None

    for changed, found in (
        (
            replace(old, layers={"b": DenseGradient(torch.ones(4, dtype=torch.int32), 1)}, samples=()),
            "found torch.int32",
        ),
        (replace(old, layers={"b": Foreign()}, samples=()), "b: expected one of geomkit's own types, found Foreign"),
    ):
        with pytest.raises(DataError, match=found):
            changed.save(tmp_path)
    assert names(tmp_path) == before
    assert identical(old, load_gradients(tmp_path))


# --------------------------------------------------------------------------------------------------- the right model


def of_model(model, *, provenance=True, pattern=""):
    layers = {
        name: DenseGradient(some(0, *parameter.shape), 1)
        for name, parameter in model.named_parameters()
        if pattern in name
    }
    coverage = Coverage({name: gradient.floats for name, gradient in layers.items()}, {}, {})
    return GradientSet(layers, 0.5, 1, 1, coverage, provenance=origin(model) if provenance else None)


def both_kinds(gradients, folder):
    gradients.save(folder)
    subspace(gradients, rank=1, side="right").save(folder)
    return load_gradients, load_subspace


def test_the_model_they_come_from_is_accepted(tmp_path):
    for tied, pattern in ((False, ""), (True, ""), (False, "mlp")):
        for load in both_kinds(of_model(tiny_llama(tied=tied), pattern=pattern), tmp_path):
            model = tiny_llama(tied=tied)
            model.config._name_or_path = "moved/elsewhere"
            load(tmp_path, model=model)
            load(tmp_path, torch.nn.DataParallel(model))


def test_other_weights_are_refused_with_a_diff(tmp_path):
    model = tiny_llama()
    weights = origin(model).weights[:8]
    for load in both_kinds(of_model(model), tmp_path):
        with pytest.raises(DataError) as error:
            load(tmp_path, tiny_llama(seed=1))
        assert f"collected from LlamaForCausalLM in float32, found other weights (weights: {weights}…" in str(
            error.value
        )
        assert str(error.value).endswith("; give that model, or leave model= out to look at the numbers alone")
        with pytest.raises(DataError, match=r"found other weights \(dtype: float32 ≠ bfloat16; weights: "):
            load(tmp_path, tiny_llama().to(torch.bfloat16))
        load(tmp_path)


def test_other_names_and_shapes_are_refused_with_a_diff(tmp_path):
    for load in both_kinds(of_model(tiny_llama(num_hidden_layers=3), pattern="2.mlp"), tmp_path):
        with pytest.raises(DataError) as error:
            load(tmp_path, tiny_llama())
        assert (
            "found 3 parameters that are not alike (model.layers.2.mlp.gate_proj.weight: "
            f"{'(24, 16)' if load is load_gradients else '(16,)'} saved, none in the model; model.layers.2.mlp.up_proj."
        ) in str(error.value)
    wide = of_model(tiny_llama(intermediate_size=40), pattern="0.mlp")
    gradients, subspaces = both_kinds(wide, tmp_path)
    with pytest.raises(DataError, match=r"3 .* \(model.layers.0.mlp.gate_proj.weight: \(40, 16\) saved, \(24, 16\) in"):
        gradients(tmp_path, tiny_llama())
    with pytest.raises(DataError, match=r"1 .* \(model.layers.0.mlp.down_proj.weight: \(40,\) saved, \(24,\) in the"):
        subspaces(tmp_path, tiny_llama())
    subspace(wide, rank=1, side="left").save(tmp_path)
    with pytest.raises(DataError, match=r"2 .* \(model.layers.0.mlp.gate_proj.weight: \(40,\) saved, \(24,\) in the"):
        subspaces(tmp_path, tiny_llama())
    subspace(wide, rank=1, side="both").save(tmp_path)
    with pytest.raises(DataError, match=r"3 .* \(model.layers.0.mlp.gate_proj.weight: \(40, 16\) saved, \(24, 16\) in"):
        subspaces(tmp_path, tiny_llama())


def test_without_provenance_no_model_can_be_checked(tmp_path):
    for load in both_kinds(of_model(tiny_llama(), provenance=False), tmp_path):
        assert load(tmp_path).provenance is None
        with pytest.raises(DataError, match="found no record of the weights that they were collected with; give"):
            load(tmp_path, tiny_llama())


# ------------------------------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("place", ["Draft.write", "Draft.move_to", "Draft.__init__", "json"])
def test_a_save_that_fails_leaves_the_old_result_and_no_trace(tmp_path, monkeypatch, place):
    old, new = every_form(), every_form(seed=3)
    (tmp_path / "other").touch()
    old.save(tmp_path)
    before = names(tmp_path)

    def fail(*arguments):
        raise OSError("no space left on device")

    if place == "json":
        monkeypatch.setattr(folders, "write_atomically", fail)
    else:
        monkeypatch.setattr(files.Draft, place.split(".")[1], fail)
    with pytest.raises(DataError, match=r"expected to write .*no space left.*; choose another place"):
        new.save(tmp_path)
    assert names(tmp_path) == before
    assert identical(old, load_gradients(tmp_path))
    monkeypatch.undo()
    new.save(tmp_path)
    assert identical(new, load_gradients(tmp_path))
    assert len(names(tmp_path)) == 3


def test_saving_over_damaged_json_repairs_it(saved):
    (saved / "gradients.json").write_text("{")
    every_form(seed=2).save(saved)
    assert identical(every_form(seed=2), load_gradients(saved))
    assert len(names(saved)) == 2


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "text"
    files.write_atomically(path, "é")
    assert path.read_bytes() == "é".encode()

    def full(_handle):
        raise OSError("full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="found full; choose another place"):
        files.write_atomically(path, "new")
    assert path.read_bytes() == "é".encode()
    assert names(path.parent) == ["text"]


def saved_if_nobody_holds_the_lock(folder, result):
    fcntl = pytest.importorskip("fcntl")
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    finally:
        os.close(handle)
    result.save(folder)


@pytest.mark.parametrize(("place", "step"), [(folders, "_document"), (hashlib, "file_digest")])
def test_a_reader_that_saves_keep_overtaking_reads_under_the_lock(tmp_path, monkeypatch, place, step):
    every_form(0).save(tmp_path)
    original, seeds = getattr(place, step), count(1)

    def overtaken(*arguments):
        done = original(*arguments)
        saved_if_nobody_holds_the_lock(tmp_path, every_form(next(seeds)))
        return done

    monkeypatch.setattr(place, step, overtaken)
    assert identical(every_form(1), load_gradients(tmp_path))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_that_are_killed_or_compete_leave_one_whole_result(tmp_path):
    code = f"from tests.helpers.saves import disturbed\ndisturbed({str(tmp_path)!r})"
    done = subprocess.run(  # noqa: S603 - our own code
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
