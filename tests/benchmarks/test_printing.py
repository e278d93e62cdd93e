from latentrt.benchmarks.printing import amount, lines
from latentrt.benchmarks.records import Document, Row

CASE = {"width": 64, "steps": 20}


def _row(side: str, *rounds: tuple[float, ...], workload: str = "unet", **more: object) -> Row:
    return Row(side=side, workload=workload, case=CASE, rounds=rounds, **more)  # pyright: ignore[reportArgumentType]


def test_a_terminal_shows_ratios_and_failures() -> None:
    document = Document(
        benchmark="latency",
        model={},
        settings={},
        rows=(
            _row("latentrt", (0.010, 0.012), (0.011, 0.010), figures={"of_best_gemm": 0.9512}),
            _row("latentrt again", (0.0105, 0.0126), (0.011, 0.010)),
            _row("diffusers", (0.020, 0.024), (0.022, 0.020), figures={"relative_l2": 1.5e-6}),
            _row("openvino", status="FAILED", reason="its picture is another"),
            Row(side="latentrt", workload="peak", unit="B", rounds=((3.5 * 2**30,),)),
        ),
    )
    head, ours, again, diffusers, peak, openvino = lines(document)
    assert head.split() == ["workload", "side", "p50", "p90", "p99", "n"]
    assert "10.5 ms" in ours
    assert "of_best_gemm 0.951" in ours
    assert "A/A spread 2.4%" in again
    assert "2.00x ours (2.00 to 2.00)" in diffusers
    assert "relative_l2 1.5e-06" in diffusers
    assert "3.5 GiB" in peak
    assert openvino == "unet, openvino: FAILED, its picture is another"


def test_amounts() -> None:
    seconds = [amount(value, "s") for value in (12.34, 0.0123, 1.5e-5, 2e-8, 0.0, 1500.0)]
    assert seconds == ["12.3 s", "12.3 ms", "15 us", "20 ns", "0 ns", "1500 s"]
    assert [amount(value, "B") for value in (0.0, 2048.0, 5 * 2**20)] == ["0.0 B", "2.0 KiB", "5.0 MiB"]
    assert amount(0.25, "1/s") == "0.25 1/s"
