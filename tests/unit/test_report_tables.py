"""The report's figures as rows and as numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from rwkvq.report.data import Budget, Disjointness, Distillation, Estimate, ReportData, StageTime
from rwkvq.report.headlines import headlines
from rwkvq.report.tables import (
    bits_table,
    budget_sentences,
    disjointness_sentences,
    distillation_sentences,
    flatten,
    measured_on,
    metrics,
    parts,
    parts_table,
    quality_table,
    stage_table,
    summary_rows,
    tensor_table,
)
from tests.made_up_report import report


@pytest.fixture(scope="module")
def data() -> ReportData:
    return report()


def test_the_models_stand_side_by_side(data: ReportData) -> None:
    rows = {row["measure"]: row for row in summary_rows(data)}
    assert list(rows) == [
        "file size",
        "matrix bits",
        "body bits",
        "file bits",
        "text perplexity",
        "KL, nats a token",
        "KL, 99th percentile",
        "top-1 agreement, %",
        "LAMBADA perplexity",
        "LAMBADA accuracy, %",
    ]
    assert rows["KL, nats a token"] == {
        "measure": "KL, nats a token",
        "float": "–",
        "RTN": "0.09701 ± 0.00130",
        "quantized": "0.05532 ± 0.00088",
    }
    assert quality_table(data).strong == {3}


def test_measures_that_nobody_has_are_left_out(data: ReportData) -> None:
    without = tuple(replace(row, lambada_perplexity=None, lambada_accuracy=None) for row in data.quality)
    labels = [row[0] for row in quality_table(replace(data, quality=without)).rows]
    assert not any("LAMBADA" in label for label in labels)
    assert quality_table(replace(data, quality=())).rows == ()


def test_the_parts_add_up_to_the_file(data: ReportData) -> None:
    found = parts(data)
    assert sum(part.stored_bits for part in found) == 8 * data.sizes.file_bytes
    assert sum(part.weights for part in found) == data.sizes.weights
    assert [part.key for part in found] == ["matrix", "lora", "elementwise", "keep", "emb", "head", "rest"]
    assert parts_table(data).rows[-1] == ("headers, alignment", "–", "41.2 kB", "0.4 %", "–")


def test_matrix_part_counts_only_matrices(data: ReportData) -> None:
    matrices = [row for row in data.tensors if row.weight_class == "matrix"]
    assert parts(data)[0].stored_bits == sum(row.stored_bits for row in matrices)


def test_file_bits_name_bytes_and_weights(data: ReportData) -> None:
    row = bits_table(data).rows[-1]
    assert row[0] == "file bits"
    assert f"{data.sizes.file_bytes:,} bytes" in row[2]
    assert f"{data.sizes.weights:,} weights" in row[2]


def test_a_plan_without_matrices_has_no_matrix_bits(data: ReportData) -> None:
    sizes = replace(data.sizes, nominal_by_count=None, nominal_by_weights=None, matrix_bits=None)
    assert [row[1] for row in bits_table(replace(data, sizes=sizes)).rows][:3] == ["–", "–", "–"]


def test_headlines_come_in_order_of_interest(data: ReportData) -> None:
    cards = headlines(data)
    assert [card.title for card in cards] == [
        "File size",
        "Bits per weight",
        "KL, nats a token",
        "Top-1 agreement, %",
        "Text perplexity",
        "LAMBADA accuracy, %",
    ]
    assert cards[0].remark == "43.0 % smaller"
    assert cards[2].figures == (("RTN", "0.09701"), ("quantized", "0.05532"))
    assert cards[2].remark == "± 0.00088, 0.57 × RTN"
    assert cards[4].figures == (("float", "28.31"), ("quantized", "29.20"))
    assert cards[4].remark == "± 0.43, 3.1 % above float"


def test_headlines_without_evaluation_are_the_sizes(data: ReportData) -> None:
    assert [card.title for card in headlines(replace(data, quality=()))] == ["File size", "Bits per weight"]


def test_headlines_without_baseline_show_ours_alone(data: ReportData) -> None:
    rows = tuple(row for row in data.quality if row.role != "baseline")
    card = headlines(replace(data, quality=rows))[2]
    assert card.figures == (("quantized", "0.05532"),)
    assert card.remark == "± 0.00088"


def test_a_diverged_model_is_reported_not_hidden(data: ReportData) -> None:
    broken = replace(data.quality[2], perplexity=Estimate(math.inf, math.nan))
    diverged = replace(data, quality=(*data.quality[:2], broken))
    card = next(card for card in headlines(diverged) if card.title == "Text perplexity")
    assert card.figures[-1] == ("quantized", "not finite")
    assert "perplexity" not in metrics(diverged)["quality"]["quantized"]


def test_shared_text_is_admitted(data: ReportData) -> None:
    leaked = replace(data, disjointness=(Disjointness("a.txt", 100, 0, 32), Disjointness("b.txt", 1000, 7, 32)))
    clean, dirty = disjointness_sentences(leaked)
    assert clean.startswith("a.txt: none of its 100")
    assert dirty.startswith("b.txt: 7 of its 1,000") and dirty.endswith("too good.")


def test_token_counts_go_with_the_figures(data: ReportData) -> None:
    text = " ".join(measured_on(data))
    assert "65,536 tokens" in text and "32,768 predictions" in text and "500 examples" in text
    assert measured_on(replace(data, evaluation=None, calibration=None)) == []


def test_distillation_says_what_it_gained_and_took(data: ReportData) -> None:
    assert distillation_sentences(data) == []
    done = replace(data, distillation=Distillation(113, 0.0185, 0.0176, 56))
    first, second = distillation_sentences(done)
    assert "0.01850 before, 0.01760 after, 0.951 of it" in first and "took" not in first
    assert "113 vectors" in second and "step 56" in second
    timed = replace(done, stages=(*data.stages, StageTime("distill", 125.0)))
    assert "It took 2 min" in distillation_sentences(timed)[0]


def test_a_budget_says_what_it_expected_and_what_came(data: ReportData) -> None:
    assert budget_sentences(data) == []
    rows = tuple(replace(row, format="trellis", method="trellis") for row in data.tensors[:3])
    asked = replace(data, tensors=rows, budget=Budget("3.275 bits a matrix weight", "quality", 0.0174195))
    first, second = budget_sentences(asked)
    measured = data.quality_of("quantized")
    assert measured is not None and measured.kl is not None
    assert first.startswith("Divergence from the float model, nats a token: predicted 0.01742, measured 0.05")
    assert "Asked for 3.275 bits a matrix weight, formats quality" in second and "3 trellis." in second
    assert "measured" not in budget_sentences(replace(asked, quality=()))[0]
    assert asked.budget is not None
    grouped = replace(asked.budget, launch_groups="block", predicted_kl_without_groups=0.0167)
    price = budget_sentences(replace(asked, budget=grouped))[2]
    assert price.startswith("Launch groups by block")
    assert price.endswith("rate: 4.3 % above the 0.01670 predicted without.")


def test_stage_times_and_their_sum(data: ReportData) -> None:
    rows = dict(stage_table(data).rows)
    assert rows["windows"] == "reused"
    assert rows["quantize"] == "32 s"
    assert rows["total"] == "3 min 52 s"


def test_every_tensor_has_a_row_with_its_reason(data: ReportData) -> None:
    rows = tensor_table(data.tensors).rows
    assert [row[0] for row in rows] == [tensor.name for tensor in data.tensors]
    assert all(row[-1] for row in rows)
    kept = next(row for row in rows if row[0] == "emb.weight")
    assert kept[2:6] == ("dense / keep", "2.10 M", "16.000", "–")


def test_metrics_are_finite_json_without_times(data: ReportData) -> None:
    values = metrics(data)
    json.dumps(values, allow_nan=False)
    assert values["quality"]["quantized"]["kl"] == 0.05532
    assert values["quality"]["quantized"]["kl_se"] == 0.00088
    assert "kl" not in values["quality"]["float"]
    assert values["sizes"]["matrix_bits"] == 3.481
    slower = replace(data, stages=tuple(replace(stage, seconds=9.0) for stage in data.stages))
    assert metrics(slower) == values


def test_nested_values_become_dotted_names() -> None:
    nested = {"a": {"b": 1, "c": None}, "d": ["x", "y"], "e": [{"f": True}], "g": []}
    assert flatten(nested) == [("a.b", "1"), ("a.c", "–"), ("d", "x, y"), ("e.0.f", "True"), ("g", "")]
