"""A results file of gpu_suite.py as a table in Markdown and a plot beside the file."""
from __future__ import annotations

import json
from pathlib import Path

LAYER = ("bf16", "fp8", "ours", "ours ConvRot", "comfy_kitchen cuda ConvRot", "torchao")


def write(path: Path) -> str:
    """The table; FILE.md beside FILE.json, and FILE.png where there is matplotlib."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    text = "\n\n".join(filter(None, (head(whole), steps(whole), products(whole), linear(whole), side_by_side(whole), models(whole),
                                     soak(whole)))) + "\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    try:
        plot(whole, path.with_suffix(".png"))
    except ImportError:
        text += "(no plot: matplotlib is not installed)\n"
    return text


def rows(whole: dict, step: str) -> list[dict]:
    return whole["steps"].get(step, {}).get("rows", [])


def head(whole: dict) -> str:
    facts = whole["facts"]
    text = (f"{facts['device']}, driver {facts['driver']}, torch {facts['torch']}, Triton {facts['triton']}, pack {facts['commit']}, "
            f"{max((step.get('date', '') for step in whole['steps'].values()), default='')[:10]}; one run")
    return f"**{facts['note']}**\n\n{text}" if facts.get("note") else text


def steps(whole: dict) -> str:
    lines = ["| step | status | seconds | rows | wrong |", "|---|---|---|---|---|"]
    for name, step in whole["steps"].items():
        wrong = [row.get("kernel") or row.get("contender") or row.get("group") or f"row {i}"
                 for i, row in enumerate(step["rows"]) if row.get("ok") is False]
        cells = (name, step["status"], f"{step.get('seconds', 0):.0f}", len(step["rows"]), ", ".join(map(str, wrong)) or "-")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def linear(whole: dict) -> str:
    """Times faster than bf16, with what the card's rates would give."""
    found = [row for row in rows(whole, "linear") if "ratio_to_bf16" in row]
    if not found:
        return ""
    names = [name for name in LAYER[1:] if any(name in row["ratio_to_bf16"] for row in found)]
    lines = ["| K, N | rows | bf16 ms | " + " | ".join(names) + " | expected at the card's rates | GEMM TOPS | quantizer GB/s |",
             "|---|---|---|" + "---|" * (len(names) + 3)]
    seen = set()
    for row in found:
        shape = row["K"], row["N"], row["M"]
        if shape in seen:
            continue
        seen.add(shape)
        cells = [f"{row['ratio_to_bf16'][name]:.2f}x" if name in row["ratio_to_bf16"] else "-" for name in names]
        expected = f"{row['expected_ratio']:.2f}x" if "expected_ratio" in row else "-"
        lines.append(f"| {shape[0]}, {shape[1]} | {shape[2]} | {row['milliseconds']['bf16']:.3f} | {' | '.join(cells)} | {expected} | "
                     f"{row['gemm_tops'].get('gemm ours', 0):.4g} | {row['quantizer_gb_s'].get('quantize ConvRot', 0):.4g} |")
    return "\n".join(lines)


def products(whole: dict) -> str:
    """Of step tune: the fastest of all products, and what it is compared with, in TOPS."""
    lines = ["| K, N | rows | the fastest | TOPS | torch._int_mm | comfy_kitchen |", "|---|---|---|---|---|---|"]
    for row in rows(whole, "tune"):
        if "milliseconds" not in row or row["M"] not in (256, 1024, 4096, 16384):
            continue
        tops = {name: f"{2 * row['M'] * row['K'] * row['N'] / value / 1e9:.0f}" for name, value in row["milliseconds"].items()}
        lines.append(f"| {row['K']}, {row['N']} | {row['M']} | {row['chosen']} | {tops.get(row['chosen'], '-')} | "
                     f"{tops.get('torch._int_mm', '-')} | {tops.get('comfy_kitchen', '-')} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def side_by_side(whole: dict) -> str:
    """Of steps profile and full."""
    lines = ["| step | how | s a step | against the first | GPU busy, s a step | difference |", "|---|---|---|---|---|---|"]
    for step in ("profile", "full"):
        measured = [row for row in rows(whole, step) if row.get("seconds_a_step", 0) > 0]
        for row in measured:
            busy = row.get("profile", {}).get("busy")
            lines.append(f"| {step} | {row['contender']} | {row['seconds_a_step']:.4f} | "
                         f"{measured[0]['seconds_a_step'] / row['seconds_a_step']:.2f}x | {f'{busy / 4:.4f}' if busy else '-'} | "
                         f"{row['difference']:.1e} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def models(whole: dict) -> str:
    lines = ["| model | how | first image s | restart s | s a step | against eager bf16 | peak GB | recompiles | difference |",
             "|---|---|---|---|---|---|---|---|---|"]
    for step in ("flux", "flux_full", "wan", "sdxl", "memory", "modes"):
        measured = [row for row in rows(whole, step) if row.get("seconds_a_step")]
        for row in measured:
            peak = (row["memory_steps"]["torch_peak"] or row["memory_steps"]["used_peak"]) / 2**30
            restart = f"{row['restart_image']:.1f}" if "restart_image" in row else "-"
            difference = max(row.get("difference", {}).values(), default=float("nan"))
            base, seconds = measured[0]["seconds_a_step"], row["seconds_a_step"]
            # Of two short runs on a busy machine the longer may take less: no time.
            speed = f"{seconds:.4f} | {base / seconds:.2f}x" if min(base, seconds) > 0 else "- | -"
            lines.append(f"| {step} | {row['contender']} | {row['first_image']:.1f} | {restart} | {speed} | {peak:.1f} | "
                         f"{row.get('recompiles_changes', '-')} | {difference:.1e} |")
    for step in ("flux", "flux_full", "wan"):
        for row in rows(whole, step):
            if "predicted" in row:
                p = row["predicted"]
                lines.append(f"\n{step} at the rates of {p['card']}: Linear layers {p['bf16_linear']:.3g} ms in bf16, "
                             f"{p['int8_linear']:.3g} in INT8, attention {p['attention']:.3g}: a step {p['expected_ratio']:.2f}x as fast.")
    return "\n".join(lines) if len(lines) > 2 else ""


def soak(whole: dict) -> str:
    total = next((row for row in rows(whole, "soak") if "total" in row), None)
    if total is None:
        return ""
    late = sum(row["recompiles"] for row in rows(whole, "soak") if "prompt" in row and not row.get("first_of_its_kind"))
    return (f"Soak: {total['total']} mixed prompts, {len(total['wrong'])} wrong, worst difference {total['worst']:.1e}, {late} recompiles "
            "after the first of each batch size.")


def plot(whole: dict, path: Path) -> None:
    """Layers, times faster than bf16, beside the floor; products in TOPS; seconds a step of each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = [row for row in rows(whole, "linear") if "ratio_to_bf16" in row and row["M"] > 1]
    layers = list({(row["K"], row["N"], row["M"]): row for row in layers}.values())
    contenders = {step: [row for row in rows(whole, step) if row.get("seconds_a_step", 0) > 0]
                  for step in ("profile", "full", "flux", "flux_full", "wan", "sdxl")}
    tuned = [row for row in rows(whole, "tune") if row.get("M") == 4096 and "milliseconds" in row]
    contenders = {step: found for step, found in contenders.items() if found}
    count = bool(layers) + bool(tuned) + len(contenders)
    if not count:
        return
    height = [max(3, 0.3 * len(layers))] * bool(layers) + [max(3, 0.4 * len(tuned))] * bool(tuned)
    height += [0.4 * len(found) + 1 for found in contenders.values()]
    figure, axes = pyplot.subplots(count, 1, figsize=(9, sum(height)), squeeze=False, height_ratios=height, layout="constrained")
    axes = list(axes[:, 0])
    if layers:
        axis = axes.pop(0)
        names = [name for name in LAYER[1:] if any(name in row["ratio_to_bf16"] for row in layers)]
        places = range(len(layers))
        for number, name in enumerate(names):
            axis.barh([place + (number - len(names) / 2) * 0.8 / len(names) for place in places],
                      [row["ratio_to_bf16"].get(name, 0) for row in layers], 0.8 / len(names), label=name)
        axis.plot([row.get("expected_ratio", float("nan")) for row in layers], list(places), "k|", markersize=12, label="the card's rates")
        axis.set_yticks(list(places), [f"{row['M']} x {row['K']} -> {row['N']}" for row in layers])
        axis.axvline(1, color="grey", linewidth=1)
        axis.invert_yaxis()
        axis.set_title("Linear layer: times faster than bf16")
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.04), ncols=len(names) + 1)
    if tuned:
        axis = axes.pop(0)
        names = ("the fastest", "torch._int_mm", "comfy_kitchen")
        for number, name in enumerate(names):
            taken = [row["milliseconds"].get(row["chosen"] if name == names[0] else name, float("inf")) for row in tuned]
            axis.barh([place + (number - 1) * 0.27 for place in range(len(tuned))],
                      [2 * row["M"] * row["K"] * row["N"] / value / 1e9 for row, value in zip(tuned, taken)], 0.27, label=name)
        axis.set_yticks(range(len(tuned)), [f"{row['K']} -> {row['N']}" for row in tuned])
        axis.invert_yaxis()
        axis.set_title("INT8 product of 4096 rows with scales, bias and cast: TOPS")
        axis.legend(fontsize=8)
    for axis, (step, found) in zip(axes, contenders.items()):
        axis.barh([row["contender"] for row in found], [row["seconds_a_step"] * 1e3 for row in found])
        axis.invert_yaxis()
        axis.set_title(f"{step}: ms a step")
    figure.suptitle(whole["facts"]["device"] + (" (dry run: no measurement)" if whole["facts"].get("note") else ""))
    figure.savefig(path, dpi=110)
