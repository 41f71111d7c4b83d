"""GGUF files that are cut short, or whose parts are not where the header says."""

import os
import struct
import time

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_cases import open_gguf, write

import nyscaled as nys
from nyscaled.checkpoints import gguf_layout


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def test_files_that_are_cut_short_or_none_of_gguf_are_refused(path):
    whole = write(path, "llama").read_bytes()
    metadata = whole.index(b"token_embd.weight")
    for size in (0, 3, 20, 200, metadata, metadata + 30, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.gguf is not a sound GGUF file"):
            nys.models.load(path)
    many = {"tokenizer.ggml.scores": [True] * 7}  # a byte each
    whole = write(path, "llama", metadata=many).read_bytes()
    count = whole.index(b"ggml.scores") + len(b"ggml.scores") + 8
    assert whole[count] == 7
    path.write_bytes(whole[: count + 4] + b"\xff" + whole[count + 5 :])  # 10¹² of them
    with pytest.raises(ValueError, match="it ends before what it announces"):
        nys.models.load(path)
    path.write_bytes(b"PK" + whole)
    with pytest.raises(ValueError, match="is not a sound GGUF file: GGUF magic invalid"):
        nys.models.load(path)
    path.unlink()
    with pytest.raises(ValueError, match=r"not a sound GGUF file.*No such file"):
        nys.models.load(path)


def entry(path, name):
    """The file's bytes, and where the entry of a tensor has its shape, its type and its offset."""
    (tensor,) = (t for t in gguf.GGUFReader(path).tensors if t.name == name)
    shape = tensor.field.offset + 8 + len(name) + 4
    kind = shape + 8 * len(tensor.shape)
    return path.read_bytes(), shape, kind, kind + 4


def changed(whole, place, form, value):
    return whole[:place] + struct.pack(form, value) + whole[place + struct.calcsize(form) :]


LAYOUT = "is not a sound GGUF file: .*(lies at|ends before|goes on for|which is not known|has rows)"


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.0.ffn_up.weight", "output_norm.weight"])
def test_tensors_lie_where_the_ones_before_them_end(name, path):
    """As llama.cpp has it: otherwise a tensor has another's bytes, or the header's."""
    whole, shape, kind, offset = entry(write(path, "llama"), name)
    (there,) = struct.unpack_from("<Q", whole, offset)
    offsets = {0, 4, there + 4, there - 32, there + 32, 2**63, 2**64 - 1, 2**64 - 32} - {there}
    for value in offsets:
        path.write_bytes(changed(whole, offset, "<Q", value % 2**64))
        with pytest.raises(ValueError, match=LAYOUT):
            open_gguf(path)
    for value in {*range(45)} - {Kind.F32, Kind.I32}:  # which have as many bytes
        path.write_bytes(changed(whole, kind, "<I", value))
        with pytest.raises(ValueError, match=LAYOUT):
            open_gguf(path)
    for value in (0, 1, 2**62, 2**64 - 1):
        path.write_bytes(changed(whole, shape, "<Q", value))
        with pytest.raises(ValueError, match=LAYOUT):
            open_gguf(path)
    for value in (0, 5, 2**32 - 1):
        path.write_bytes(changed(whole, shape - 4, "<I", value))
        with pytest.raises(ValueError, match=r"not a sound GGUF file: .*expected 1 to 4"):
            open_gguf(path)


@pytest.mark.parametrize("alignment", [1, 8, 64])
def test_alignments(alignment, path):
    """A power of two, for which all offsets are then right."""
    opened = open_gguf(write(path, "llama"))
    expected = {name: opened.read(name).copy() for name in opened.names}
    got = open_gguf(write(path, "llama", metadata={"general.alignment": alignment}))
    for name, value in expected.items():
        np.testing.assert_array_equal(got.read(name), value)


def test_files_whose_parts_do_not_fit_are_refused(path):
    whole = write(path, "llama").read_bytes()
    (tensors, pairs) = struct.unpack_from("<QQ", whole, 8)
    twice = b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id"
    same = b"blk.0.ffn_up.weight", b"blk.1.ffn_up.weight"
    cases = {
        "goes on for .* bytes after": whole + b"\0" * 64,
        r"has the key 'tokenizer\.ggml\.bos_token_id' twice": whole.replace(*twice[::-1]),
        r"has the tensor 'blk\.1\.ffn_up\.weight' twice": whole.replace(*same),
        "ends before what it announces": changed(whole, 8, "<Q", 2**60),
        "ends before what it announces.*": changed(whole, 16, "<Q", 2**64 - 1),
        "version 1; expected 2 or 3": changed(whole, 4, "<I", 1),
        "sound GGUF file": changed(whole, 16, "<Q", pairs - 1),
        "sound GGUF file.*": changed(whole, 8, "<Q", tensors - 1),
    }
    for message, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_gguf(path)
    for alignment in (0, 3, 48):
        with pytest.raises(ValueError, match=r"alignment is \d+; expected a power of two"):
            open_gguf(
                rewritten(write(path, "llama", metadata={"general.alignment": 32}), alignment)
            )
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is not a regular file"):
        nys.models.load(path)


def rewritten(path, alignment):
    whole = path.read_bytes()
    place = whole.index(b"general.alignment") + len(b"general.alignment") + 4
    path.write_bytes(changed(whole, place, "<I", alignment))
    return path


def test_large_arrays_are_read_at_once(path):
    """A million bytes, which took seconds one by one. Beyond a limit they are refused."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_key_value("x", np.zeros(10**6, np.uint8).tobytes(), gguf.GGUFValueType.ARRAY)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    start = time.process_time()
    with pytest.raises(ValueError, match="it lacks"):
        open_gguf(path)
    assert time.process_time() - start < 1
    monkey = pytest.MonkeyPatch()
    monkey.setattr(gguf_layout, "MAX_ELEMENTS", 10**6 - 1)
    with monkey.context(), pytest.raises(ValueError, match="more than 999999 elements"):
        open_gguf(path)
    monkey.undo()


def test_the_other_byte_order_is_refused(path):
    write(path, "llama", order=gguf.GGUFEndian.BIG)
    with pytest.raises(ValueError, match="has the other byte order; expected this machine's"):
        nys.models.load(path)
