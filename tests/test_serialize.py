# SPDX-License-Identifier: Apache-2.0
"""A file gives back every bit that was saved, or is refused with the reason; it is never half a file, never a pickle."""

import importlib.metadata
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import safetensors.torch
import torch
from diagonals import of_sums
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import fisherfast as ff
from fisherfast.accumulator import Accumulator
from fisherfast.fisher import DiagonalFisher, FisherFileError, Provenance, load, load_with_extra, serialize


def example(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def total(*shape):
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    return of_sums(
        # Not in alphabetical order, with a scalar and an empty tensor.
        {"z.weight": Accumulator(total(5, 3), 7), "a.weight": Accumulator(total(2, 3, 2), 6.5), "s": Accumulator(total(), 7)},
        num_samples=7,
        num_positions=35,
        provenance=Provenance("mc", "categorical", draws=3, seed=11, model="Net"),
        coverage={"z.weight": "linear_sq_", "a.weight": "loop", "b": "missing: no rule for 'einsum'"},
        aliases={"head.weight": "z.weight"},
        batches=2,
    )


def assert_identical(a, b):
    (tensors, fields), (other_tensors, other_fields) = a.state(), b.state()
    assert a.names == b.names and json.dumps(fields) == json.dumps(other_fields)
    for name in a.names:
        assert torch.equal(tensors[name].view(torch.int64), other_tensors[name].view(torch.int64))


def test_load_is_bit_exact_and_keeps_the_order(tmp_path):
    F = example()
    F.save(tmp_path / "run.safetensors")
    G = load(tmp_path / "run.safetensors")
    assert G.names == ("z.weight", "a.weight", "s")
    assert_identical(F, G)
    assert G.provenance == F.provenance and G.coverage == F.coverage and G.aliases == F.aliases and G.batches == 2


FLOATS = st.floats(min_value=0, allow_nan=False, allow_infinity=False)  # subnormals and 1e308 included


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1), st.lists(FLOATS, max_size=5), min_size=1, max_size=4),
    FLOATS,
)
def test_load_is_bit_exact_for_any_names_and_values(tmp_path_factory, entries, weight):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    sums = {name: Accumulator(torch.tensor(values, dtype=torch.float64), weight) for name, values in entries.items()}
    F = of_sums(sums, num_samples=3)
    F.save(path)
    assert_identical(F, load(path))


def test_loaded_fisher_can_be_pooled(tmp_path):
    F, path = example(), tmp_path / "run.safetensors"
    F.save(path)
    assert_identical(load(path) + example(1), F + example(1))


def test_tensors_are_readable_by_plain_safetensors_and_tied_ones_stored_once(tmp_path):
    F, path = example(), tmp_path / "run.safetensors"
    F.save(path)
    tensors = safetensors.torch.load_file(path)
    assert set(tensors) == {"z.weight", "a.weight", "s"}
    assert all(torch.equal(tensors[name], F._sums[name].sum) for name in tensors)


def test_views_of_one_buffer_are_saved(tmp_path):
    buffer = torch.arange(1, 16, dtype=torch.float64)
    F = of_sums({"a": Accumulator(buffer[:4], 1), "b": Accumulator(buffer[4:], 1)}, num_samples=1)
    F.save(tmp_path / "run.safetensors")
    assert_identical(F, load(tmp_path / "run.safetensors"))


def test_extra_strings_come_back(tmp_path):
    path, extra = tmp_path / "run.safetensors", {"batches done": "17", "ü": "\n"}
    example().save(path, extra=extra)
    F, loaded = load_with_extra(path)
    assert loaded == extra
    assert_identical(F, example())
    with pytest.raises(TypeError, match=r"extra must be \{str: str\}"):
        example().save(path, extra={"batches": 17})
    with pytest.raises(
        FileNotFoundError, match=r"path must be a file in a folder that exists, got .*nowhere/run; make the folder first"
    ):
        example().save(tmp_path / "nowhere" / "run")


def test_no_pickle_is_used(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    for module, name in [(pickle, n) for n in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler")] + [
        (torch, "save"),
        (torch, "load"),
    ]:
        monkeypatch.setattr(module, name, refuse)
    example().save(tmp_path / "run.safetensors")
    assert_identical(load(tmp_path / "run.safetensors"), example())


def test_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    example().save(tmp_path / "run.safetensors")
    assert (tmp_path / "run.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def rewritten(path, **changes):
    """The file at ``path`` with other metadata; a value of None removes the entry."""
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **changes}
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {k: v for k, v in metadata.items() if v is not None})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "pt"}, r"something else \(format 'pt'\)"),
        ({"format": None}, r"something else \(format None\)"),
        (
            {"format_version": "1"},
            r"written by fisherfast .* in format 1, this version reads format 2; load it with that version",
        ),
        ({"format_version": None}, "in format None, this version reads format 2"),
        ({"structure": "full"}, r"with structure 'full'; known here: \['diagonal'"),
        ({"num_samples": "8"}, "checksum does not match"),
        ({"checksum": None}, "checksum does not match"),
    ],
    ids=str,
)
def test_rejects_other_metadata(tmp_path, changes, reason):
    path = tmp_path / "run.safetensors"
    example().save(path)
    rewritten(path, **changes)
    with pytest.raises(FisherFileError, match=rf"run\.safetensors cannot be read as a Fisher: .*{reason}"):
        load(path)


def test_rejects_foreign_files(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(FisherFileError, match=r"model\.safetensors .* something else"):
        load(path)
    for content in (b"", b"PK\x03\x04 not safetensors", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(FisherFileError, match="damaged, truncated or not a safetensors file"):
            load(path)
    with pytest.raises(FisherFileError, match="it is a folder"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        load(tmp_path / "absent.safetensors")


def test_rejects_every_truncation(tmp_path):
    path = tmp_path / "run.safetensors"
    example().save(path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(FisherFileError, match=r"run\.safetensors .*(damaged|truncated)"):
            load(path)


def test_damaged_byte_never_changes_a_number(tmp_path):
    path, F = tmp_path / "run.safetensors", example()
    F.save(path)
    content, choose, refused = path.read_bytes(), random.Random(0), 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= choose.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            assert_identical(load(path), F)  # white space in the header may change and mean the same
        except FisherFileError:
            refused += 1
    assert refused >= len(content) - 16


@pytest.mark.parametrize(("said", "instead"), [(b'"F64"', b'"I64"'), (b"[5,3]", b"[3,5]")], ids=["dtype", "shape"])
def test_rejects_damage_that_leaves_the_bytes_of_the_tensors(tmp_path, said, instead):
    path = tmp_path / "run.safetensors"
    DiagonalFisher({"w": torch.rand(5, 3)}, num_samples=7).save(path)
    content = path.read_bytes()
    assert content.count(said) == 1
    path.write_bytes(content.replace(said, instead))
    with pytest.raises(FisherFileError, match="checksum does not match"):
        load(path)


def test_rejects_devices_that_are_not_here(tmp_path):
    example().save(tmp_path / "f.safetensors")
    for device in ("cuda:99", "gpu"):
        with pytest.raises(ValueError, match=f"load: device must be one of this machine's, got '{device}' .*; pass 'cpu'"):
            load(tmp_path / "f.safetensors", device=device)


def test_rejects_the_device_that_holds_no_numbers(tmp_path):
    example().save(tmp_path / "f.safetensors")
    with pytest.raises(
        ValueError, match="load: device must hold numbers, got 'meta', whose tensors have shapes only; pass 'cpu'"
    ):
        load(tmp_path / "f.safetensors", device="meta")
    with pytest.raises(ValueError, match="to: device must hold numbers, got 'meta'"):
        example().to("meta")


def test_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    example().save(path)

    def breaks(tensors, file, metadata):
        file.write_bytes(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(serialize, "save_file", breaks)
    with pytest.raises(OSError, match="No space left"):
        example(1).save(path)
    assert os.listdir(tmp_path) == ["run.safetensors"]
    assert_identical(load(path), example())


def test_saving_again_removes_what_a_killed_process_left(tmp_path):
    path = tmp_path / "f.safetensors"
    old, new, other = (
        tmp_path / f".{name}.tmp" for name in ("f.safetensors.0123abcd", "f.safetensors.89abcdef", "g.safetensors.0123abcd")
    )
    for left in (old, new, other):
        left.write_bytes(b"half a file")
    for left in (old, other):
        os.utime(left, (time.time() - 4000, time.time() - 4000))
    example().save(path)
    assert {*tmp_path.iterdir()} == {path, new, other}  # somebody may be writing the new one
    assert_identical(load(path), example())


def test_rejects_places_that_cannot_hold_a_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="path must be a file"):
        example().save(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        example().save(tmp_path / "absent" / "run.safetensors")


WRITER = """
    import sys, torch
    from fisherfast.fisher import DiagonalFisher
    for step in range(1, 1_000_000):
        DiagonalFisher({"w": torch.full((1 << 20,), float(step))}, num_samples=step).save(sys.argv[1])
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_process_leaves_a_whole_file(tmp_path):
    path = tmp_path / "run.safetensors"
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(WRITER), str(path)]) as writer:
        while not path.exists():
            assert writer.poll() is None
            time.sleep(0.01)
        time.sleep(0.5)
        writer.send_signal(signal.SIGKILL)
    F = load(path)
    assert torch.equal(F.diagonal()["w"], torch.full((1 << 20,), float(F.num_samples)))


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "gram"])
def test_a_model_in_bfloat16_can_be_saved(structure, tmp_path):
    model, data = torch.nn.Linear(4, 3).bfloat16(), [(torch.randn(5, 4).bfloat16(), torch.randint(3, (5,)))]
    F = ff.fisher(model, data, structure, progress=False, checkpoint=tmp_path / "run.safetensors")
    F.save(tmp_path / "saved.safetensors")
    assert ff.load(tmp_path / "saved.safetensors").trace() == F.trace()


def test_a_link_stays_one(tmp_path):
    target, link = tmp_path / "target.safetensors", tmp_path / "link.safetensors"
    example().save(target)
    link.symlink_to(target)
    DiagonalFisher({"w": torch.ones(3)}, num_samples=7).save(link)
    assert link.is_symlink() and load(target).num_samples == 7


def test_a_name_as_long_as_the_file_system_takes(tmp_path):
    path = tmp_path / ("n" * 243 + ".safetensors")
    example().save(path)
    assert load(path).num_samples == example().num_samples


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac", "gram"])
def test_a_copy_on_a_device_is_what_a_file_gives_and_shares_nothing(structure, tmp_path):
    data = [(torch.randn(6, 3), torch.randint(0, 2, (6,)))]
    F = ff.fisher(
        torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)),
        data,
        structure=structure,
        progress=False,
    )
    moved = F.to("cpu")
    F.save(tmp_path / "fisher.safetensors")
    states = [one.state() for one in (F, moved, load(tmp_path / "fisher.safetensors"))]
    for tensors, fields in states[1:]:
        assert json.dumps(fields) == json.dumps(states[0][1])
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in states[0][0].items())
    pointers = [{tensor.data_ptr() for tensor in tensors.values() if tensor.numel()} for tensors, _ in states]
    assert not pointers[0] & pointers[1]
    with pytest.raises(ValueError, match="to: device must be one of this machine's"):
        F.to("cuda:77")


def test_a_source_tree_that_is_not_installed_saves_its_version(monkeypatch, tmp_path):
    def nothing_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing_installed)
    DiagonalFisher({"w": torch.ones(3)}, num_samples=2).save(tmp_path / "run.safetensors")
    with safe_open(tmp_path / "run.safetensors", "pt") as file:
        assert file.metadata()["fisherfast_version"] == ff.__version__
