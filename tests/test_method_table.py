"""The cells of the method's table, and the page that is written from them."""

import json
from dataclasses import fields, replace

import pytest

from method_cells import CELLS, COMMON, CONTRASTS, IMAGES, cell_config, changed, images_per_step, preset_of
from method_page import looks, mean_interval, write_page
from method_table import curves, run_cell
from openunirl import train
from openunirl.config import EvalConfig, from_dict, to_dict
from openunirl.presets import BUNDLED, PRESETS
from openunirl.validate import check


def made(name, model="tiny-showo", images=IMAGES):
    return cell_config(name, model, images=images, seed=3, probes=4, probe_prompts=12)


def test_the_cells():
    assert list(CELLS) == [
        *("base", "sft-e2e", "sft", "sft-t2i-only", "sft-mmu-only", "grpo-e2e", "grpo", "t2i-only", "mmu-only"),
        *("frozen", "detector", "k4", "shuffled", "recipe"),
    ]
    assert {name for _, *pair in CONTRASTS for name in pair} == CELLS.keys() - {"base"}


@pytest.mark.parametrize("model", [*BUNDLED, "tiny-janus"])
@pytest.mark.parametrize("name", CELLS)
def test_every_cell_is_valid_and_draws_equally_many_images(name, model):
    config = made(name, model)
    check(config)
    assert config.train.max_steps * images_per_step(config) == IMAGES
    assert config.train.max_steps % config.train.eval_steps == 0  # the last look is at the end
    assert (config.model.weights, config.seed, config.eval.num_prompts) == (model, 3, 0)
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_differs_from_what_is_common_in_nothing_but_what_it_names(name):
    config, start = made(name), PRESETS[preset_of("tiny-showo", name)]
    common = start if CELLS[name].recipe else changed(start, COMMON)
    for section in ("rollout", "reward", "loss", "optim"):
        own, theirs = getattr(config, section), getattr(common, section)
        differ = {f.name for f in fields(own) if getattr(own, f.name) != getattr(theirs, f.name)}
        assert differ - {"ref_model_sync_steps"} == set(CELLS[name].change.get(section, ())), section
    assert config.eval.sampling == start.eval.sampling  # all models are judged under the same sampler


def test_what_is_common_to_all_cells_but_the_recipe():
    configs = [made(name) for name, cell in CELLS.items() if not cell.recipe]
    assert len({(c.rollout.num_prompts, c.rollout.num_questions, c.train.max_steps, c.optim) for c in configs}) == 1
    assert len({c.rollout.sampling for c in configs}) == 1 and configs[0].rollout.sampling.num_timesteps == 8
    assert {(c.loss.num_scored_steps, c.train.wise_ft_alpha, c.reward.kind) for c in configs} == {(2, 1.0, "answer")}
    assert all({c.loss.image_coef, c.loss.answer_coef} <= {0.0, 1.0} for c in configs)


@pytest.mark.parametrize("model", [*BUNDLED, "tiny-janus"])
@pytest.mark.parametrize("name", CELLS)
def test_no_machine_chooses_a_cells_precision(name, model):
    assert made(name, model).train.mixed_precision == "no"


def test_the_recipe_keeps_its_rounds():
    config = made("recipe")
    syncs = range(config.loss.ref_model_sync_steps, config.train.max_steps, config.loss.ref_model_sync_steps)
    assert len(syncs) == 2  # the last round's end has no next one
    assert config.train.wise_ft_alpha == PRESETS["tiny-showo-sft"].train.wise_ft_alpha < 1


def test_what_the_cells_train():
    loss = {name: made(name).loss for name in CELLS}
    assert [name for name in CELLS if loss[name].end_to_end] == ["sft-e2e", "grpo-e2e"]
    sft = ["sft-e2e", "sft", "sft-t2i-only", "sft-mmu-only", "recipe"]
    assert [name for name in CELLS if loss[name].method == "sft"] == sft
    assert [name for name in CELLS if loss[name].answer_coef == 0] == ["sft-t2i-only", "t2i-only", "recipe"]
    assert [name for name in CELLS if loss[name].image_coef == 0] == ["sft-mmu-only", "mmu-only"]
    assert {name: made(name).reward.sources for name in ("frozen", "detector", "grpo")} == {
        "frozen": ("frozen",),
        "detector": ("detector",),
        "grpo": ("self",),
    }
    assert [name for name in CELLS if made(name).reward.shuffle] == ["shuffled"]
    assert made("k4").rollout.num_answers == 4


def test_steps_that_only_collect_are_no_updates(tmp_path):
    config = made("recipe", "tiny-janus")
    assert config.loss.replay_steps and config.loss.num_iterations == 6
    rows = [{"images": 64, "reward": 0.5}] * 2 + [{"images": 192, "reward": 0.5, "grad_norm": 0.1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": 1, "seconds": 1} | row) + "\n" for row in rows))
    assert curves(tmp_path, config)["updates"] == 6


def test_what_cannot_be_a_cell_is_refused():
    with pytest.raises(ValueError, match=r"--images is 100: .* 32"):
        made("grpo", images=100)
    with pytest.raises(ValueError, match=r"unknown cell 'best'; known: base, "):
        made("best")


def test_a_folder_of_another_recipe_or_base_is_refused(tmp_path):
    told = [to_dict(made("grpo")), [6, 6], "these weights"]
    (tmp_path / "recipe.json").write_text(json.dumps(told))
    (tmp_path / "cell.json").write_text("{}")
    run_cell("grpo", made("grpo"), tmp_path, sizes=(6, 6), base="these weights")  # it is finished
    for sizes, base in [((12, 6), "these weights"), ((6, 6), "retrained under the same name")]:
        with pytest.raises(ValueError, match="another recipe, size or base: choose another folder"):
            run_cell("grpo", made("grpo"), tmp_path, sizes=sizes, base=base)


def test_a_cell_that_was_stopped_goes_on_and_ends_like_one_that_was_not(tmp_path, monkeypatch):
    config = replace(made("t2i-only", images=64), eval=EvalConfig(num_prompts=0, during_prompts=6))
    config = replace(config, rollout=replace(config.rollout, num_prompts=1, num_generations=2))
    config = replace(config, train=replace(config.train, max_steps=2, save_steps=1, eval_steps=2))
    once, twice = tmp_path / "once", tmp_path / "twice"
    run_cell("t2i-only", config, once, sizes=(6, 6), base="")
    step = train.train_step

    def stopped(*given, **named):
        if (twice / "run" / "checkpoints" / "step-000001").exists():
            raise KeyboardInterrupt
        return step(*given, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_step", stopped)
        run_cell("t2i-only", config, twice, sizes=(6, 6), base="")
    assert not (twice / "cell.json").exists()
    run_cell("t2i-only", config, twice, sizes=(6, 6), base="")
    cells = [json.loads((folder / "cell.json").read_text()) for folder in (once, twice)]
    assert cells[0]["reward"] == cells[1]["reward"] and cells[0]["correct"] == cells[1]["correct"]
    assert (cells[1]["images"], cells[1]["updates"], len(cells[1]["probes"])) == (4, 2, 1)
    assert cells[1]["grad_norm"] > 0 and cells[1]["seed"] == 3


# -------------------------------------------------------------------------------------------------------- the page


def summary(overall):
    tasks = {tag: {"accuracy": overall} for tag in ("single_object", "two_object", "counting", "colors", "position")}
    return {
        "geneval": {"overall": overall, "tasks": tasks | {"color_attr": {"accuracy": None}}},
        "understanding": {"overall": 0.9},
        "imbalance": {"answer_wrong_given_image_right": 0.1, "image_wrong_given_answer_right": None, "score": None},
        "collusion_gap": 0.05,
    }


def finished(out, name, seed, overall, model="tiny-showo", **more):
    cell = {
        "cell": name,
        "seed": seed,
        "commit": "abc",
        "command": "table",
        "images": 128,
        "minutes": 1.0,
        "updates": 2,
        "grad_norm": 0.5,
        "reward": [[64, 0.5], [128, 0.6]],
        "probes": [[128, overall, 0.9]],
        "summary": summary(overall),
        "correct": [True],
        "understood": [True],
    }
    folder = out / model / f"{name}-{seed}"
    folder.mkdir(parents=True)
    (folder / "cell.json").write_text(json.dumps(cell | more))


def test_the_page_tells_means_intervals_and_what_stopped(tmp_path):
    for seed, (base, grpo) in enumerate([(0.5, 0.6), (0.4, 0.6), (0.3, 0.6)]):
        finished(tmp_path, "base", seed, base, reward=[], probes=[[0, base, 0.9]], images=0, minutes=0.0)
        finished(tmp_path, "grpo", seed, grpo, minutes=4.0)
    finished(tmp_path, "sft", 0, 0.7)
    stopped = {
        "cell": "k4",
        "seed": 2,
        "commit": "abc",
        "command": "table",
        "images": 64,
        "minutes": 0.5,
        "updates": 1,
        "grad_norm": None,
        "reward": [],
        "probes": [],
    }
    (tmp_path / "tiny-showo" / "k4-2").mkdir()
    (tmp_path / "tiny-showo" / "k4-2" / "cell.json").write_text(json.dumps(stopped | {"stopped": "step 2: too much"}))
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    write_page(tmp_path, page, cap=3.0)
    text = page.read_text()
    assert (tmp_path / "docs" / "results.png").stat().st_size > 10_000
    assert "| GRPO | 0.600 ±0.000 |" in text and "+0.200 ±0.248 |" in text  # .1, .2, .3 above the base
    assert "| GRPO | nothing | 2 | 0.500 ±0.000 |" in text
    assert "| GRPO, answers only | `loss.image_coef` 0.0 | — | — |" in text
    assert "| SFT | 0.700 |" in text  # one seed has no interval
    assert "| GRPO, frozen judge | — |" in text
    assert "| GRPO against SFT | -0.100 |" in text  # the seed that both have
    assert "GRPO, 4 answers, seed 2, stopped itself**: step 2: too much" in text
    assert "GRPO, seed 1: 4.0 minutes, above the 3." in text
    assert "together" not in text  # one model


def test_the_page_compares_over_both_models_and_the_four_variants(tmp_path):
    variants = {"grpo-e2e": "sft-e2e", "grpo": "sft", "t2i-only": "sft-t2i-only", "mmu-only": "sft-mmu-only"}
    for model, up in (("tiny-janus", 0.0), ("tiny-showo", 0.2)):
        for seed in (0, 1):
            finished(tmp_path, "base", seed, 0.4, model)
            for number, (grpo, sft) in enumerate(variants.items()):
                finished(tmp_path, grpo, seed, 0.5 + up, model)
                finished(tmp_path, sft, seed, 0.5 - 0.1 * number, model)  # the mean is .35
    finished(tmp_path, "grpo", 2, 0.9, "tiny-showo")  # a seed without the other variants
    write_page(tmp_path, tmp_path / "results.md", cap=3.0)
    text = (tmp_path / "results.md").read_text()
    both = text[text.index("## tiny-janus and tiny-showo together") :]
    row = "| GRPO against SFT, mean of the four variants | "
    assert f"{row}+0.150 ±0.000 |" in text and f"{row}+0.350 ±0.000 |" in text
    half = 3.182 * (0.2**2 / 3) ** 0.5 / 2  # .15, .15, .35, .35
    assert f"{row}+0.250 ±{half:.3f} | +0.000 ±0.000 | — |" in both
    assert "| GRPO, end-to-end against base | +0.200 ±" in both
    assert "+0.100 of 16 cells of GRPO that ended, -0.200 of 16 of SFT, of which 12 are below that." in both


def test_an_empty_folder_has_no_page(tmp_path):
    with pytest.raises(ValueError, match="no finished cell"):
        write_page(tmp_path, tmp_path / "results.md", cap=3.0)


def test_the_interval_by_hand():
    mean, half = mean_interval([0.1, 0.2, 0.3])  # standard deviation .1, t of 2 degrees of freedom 4.303
    assert (mean, half) == (pytest.approx(0.2), pytest.approx(4.303 * 0.1 / 3**0.5))
    assert mean_interval([0.4]) == (0.4, None)
    assert mean_interval([0.0, 1.0] * 100)[1] == pytest.approx(1.97 * 0.5 / 200**0.5, rel=0.01)


def test_no_two_lines_look_alike():
    """matplotlib's cycle has ten colours: C10 is C0."""
    shown = [looks(name) for name in CELLS if name != "base"]
    assert len({(int(one["color"][1:]) % 10, one["linestyle"]) for one in shown}) == len(shown) == len(CELLS) - 1
