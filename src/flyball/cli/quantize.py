"""`flyball quantize`: write a checkpoint whose linear layers take fewer bits, and say what each lost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flyball.cli.engine_options import Model, model_folder


def run(
    model: Model = None,
    *,
    out: Annotated[Path, typer.Option(help="New folder for the quantised checkpoint.")],
    kind: Annotated[
        Literal["int8_dynamic", "int8", "int4", "fp8", "nf4"], typer.Option("--format", help="How weights are kept.")
    ] = "int8",
    group_size: Annotated[int, typer.Option(help="Columns that share a scale, int4 and nf4.", min=1)] = 128,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="A zero point beside each scale, int8 and int4.")] = (
        False
    ),
    double_quant: Annotated[bool, typer.Option("--double-quant", help="nf4: the scales themselves in 8 bits.")] = False,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="Layer to leave as it is: a name, its end, or a pattern; may be given several times; "
                     "default: lm_head."),
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="UTF-8 text whose activations guide the rounding, int4 only (GPTQ).")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows of 256 tokens of that text that are used.", min=1)] = 32,
) -> None:  # fmt: skip
    """Quantise a checkpoint's linear layers; prints each layer's error and writes a folder that `serve` loads."""
    from flyball.cli import require
    from flyball.core.errors import InvalidInput

    require("engine", "torch", "transformers", "safetensors")
    source = model_folder(model)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise InvalidInput(f"{out} is a file or a folder that is not empty; name a new folder for the quantised model")

    from rich.console import Console
    from rich.table import Table

    from flyball.engine.quantization.files import save_quantized
    from flyball.engine.quantization.formats import QuantizationConfig, QuantizationType
    from flyball.engine.quantization.gptq import calibrate as gptq_calibrate
    from flyball.engine.quantization.gptq import load_for_calibration, text_windows
    from flyball.engine.quantization.walk import DEFAULT_SKIP, quantize_model

    config = QuantizationConfig(
        quantization_type=QuantizationType(kind),
        group_size=group_size,
        symmetric=not asymmetric,
        use_double_quant=double_quant,
    )
    names = tuple(skip) if skip else DEFAULT_SKIP
    loaded = load_for_calibration(source)
    if calibrate is None:
        report = quantize_model(loaded, config, skip=names)
    else:
        samples = text_windows(source, calibrate, windows)
        report = gptq_calibrate(loaded, config, samples, skip=names)
    size = save_quantized(loaded, source, out)
    table = Table(title=f"{source.name} in {kind}" + (f", calibrated on {calibrate.name}" if calibrate else ""))
    for column in ("layer", "shape", "bits a weight", "relative error", "largest error"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for layer in report.layers:
        table.add_row(
            layer.name, f"{layer.shape[0]} x {layer.shape[1]}", f"{layer.bits_per_weight:.2f}",
            f"{layer.relative_error:.4f}", f"{layer.max_error:.3g}",
        )  # fmt: skip
    Console().print(table)
    typer.echo(
        f"{len(report.layers)} layers at {report.bits_per_weight:.2f} bits a weight, relative error "
        f"{report.relative_error:.4f}; {len(report.skipped)} skipped; {size / 2**20:.1f} MiB of weights in {out}"
    )
