from pathlib import Path

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from latentrt.engines.errors import PackageError
from latentrt.engines.external_data import check_external_data
from tests.tiny_package import add_graph, external

ALLOWED = {"weights.safetensors": 100}


def check(folder: Path, model: onnx.ModelProto, allowed: dict[str, int] = ALLOWED) -> None:
    (folder / "unet").mkdir(exist_ok=True)
    (folder / "unet" / "weights.safetensors").write_bytes(bytes(100))
    (folder / "unet" / "loop.onnx").write_bytes(model.SerializeToString())
    check_external_data(folder / "unet" / "loop.onnx", allowed)


@pytest.mark.parametrize(("offset", "length"), [(0, 100), (84, 16), (100, 0)])
def test_accepts_bytes_of_its_own_weights(tmp_path: Path, offset: int, length: int) -> None:
    check(tmp_path, add_graph(external("weights.safetensors", offset, length)))


@pytest.mark.parametrize(
    "location",
    [
        "../weights.safetensors",
        "..",
        ".",
        "",
        "/etc/passwd",
        "./weights.safetensors",
        "sub/weights.safetensors",
        "weights.safetensors\0",
        "other.bin",
        "..\\weights.safetensors",
        "C:weights.safetensors",
        "a" * 5000,
    ],
)
def test_refuses_other_files(tmp_path: Path, location: str) -> None:
    with pytest.raises(PackageError, match="takes weights from"):
        check(tmp_path, add_graph(external(location, 0, 16)))


@pytest.mark.parametrize(("offset", "length"), [(85, 16), (0, 101), (-1, 16), (200, 0), (16, -8), (2**70, 1)])
def test_refuses_bytes_outside_the_file(tmp_path: Path, offset: int, length: int) -> None:
    with pytest.raises(PackageError, match="takes weights from"):
        check(tmp_path, add_graph(external("weights.safetensors", offset, length)))


def test_refuses_entries_that_are_no_numbers_or_lack_a_length(tmp_path: Path) -> None:
    for value in ("x", "1e3", ""):
        tensor = external("weights.safetensors", 0, 16)
        tensor.external_data[2].value = value
        with pytest.raises(PackageError, match="takes weights from"):
            check(tmp_path, add_graph(tensor))
    tensor = external("weights.safetensors", 0, 16)
    del tensor.external_data[2]
    with pytest.raises(PackageError, match="takes weights from"):
        check(tmp_path, add_graph(tensor))


def test_refuses_weights_where_none_are_allowed(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="takes weights from"):
        check(tmp_path, add_graph(external("weights.safetensors", 0, 16)), {})


def test_finds_tensors_in_every_corner_of_a_graph(tmp_path: Path) -> None:
    """Nested graphs, attributes, sparse tensors and functions are looked into."""
    bad = external("../secret", 0, 16)
    inner = add_graph(bad).graph
    plain = add_graph(external("weights.safetensors", 0, 16))

    def with_node(**attributes: object) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(plain)
        model.graph.node.append(helper.make_node("If", ["x"], ["z"], **attributes))
        return model

    sparse = onnx.ModelProto()
    sparse.CopyFrom(plain)
    sparse.graph.sparse_initializer.append(onnx.SparseTensorProto(values=bad, dims=[4]))
    function = onnx.ModelProto()
    function.CopyFrom(plain)
    function.functions.append(
        onnx.FunctionProto(name="f", node=[helper.make_node("Constant", [], ["c"], value=bad)])
    )
    for model in (
        with_node(then_branch=inner),
        with_node(value=bad),
        with_node(tensors=[bad]),
        sparse,
        function,
    ):
        with pytest.raises(PackageError, match=r"\.\./secret"):
            check(tmp_path, model)


def test_refuses_nesting_without_end(tmp_path: Path) -> None:
    graph = add_graph(TensorProto(name="bias", data_type=1, dims=[1], float_data=[1])).graph
    for _ in range(12):
        outer = helper.make_graph([helper.make_node("If", ["x"], ["y"], then_branch=graph)], "g", [], [])
        graph = outer
    with pytest.raises(PackageError, match="nested deeper"):
        check(tmp_path, helper.make_model(graph))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x08" + b"\x80" * 10, "a varint of more than ten bytes"),
        (b"\x3a\x05\x00", "a field longer than its message"),
        (b"\x0b", "wire type 3"),
        (b"\x08\x80", "index out of bounds"),
    ],
)
def test_refuses_bytes_that_are_no_protobuf(tmp_path: Path, data: bytes, why: str) -> None:
    (tmp_path / "g.onnx").write_bytes(data)
    with pytest.raises(PackageError, match=rf"g\.onnx is not a readable ONNX graph \({why}") as caught:
        check_external_data(tmp_path / "g.onnx", {})
    assert caught.value.exit_code == 3


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200))
def test_random_bytes_never_crash(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("random")
    (folder / "g.onnx").write_bytes(data)
    try:
        check_external_data(folder / "g.onnx", {})
    except PackageError:
        pass


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 10**6), value=st.integers(0, 255))
def test_mutated_graphs_never_crash(
    position: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("mutated")
    data = bytearray(add_graph(external("weights.safetensors", 0, 16)).SerializeToString())
    data[position % len(data)] = value
    (folder / "weights.safetensors").write_bytes(bytes(100))
    (folder / "g.onnx").write_bytes(data)
    try:
        check_external_data(folder / "g.onnx", ALLOWED)
    except PackageError:
        pass


def test_refuses_a_field_key_that_parsers_read_differently(tmp_path: Path) -> None:
    """C++ drops the bits above 32 of a key, so this is field 7, the graph, to ONNX Runtime."""
    model = add_graph(external("../secret", 0, 16))
    graph = model.graph.SerializeToString()
    length = bytes([0x80 | len(graph) % 128, len(graph) // 128])
    (tmp_path / "g.onnx").write_bytes(b"\xba\x80\x80\x80\x10" + length + graph)
    with pytest.raises(PackageError, match="the field key"):
        check_external_data(tmp_path / "g.onnx", {})
