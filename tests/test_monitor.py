"""The log of a run: torn lines, full disks, numbers that are none."""

import copy
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qwen_analog.data import TokenSequence
from qwen_analog.monitor import (
    LogFile,
    LossSpikeDetector,
    RunLog,
    documents_of_step,
    log_entries,
    plot_losses,
    profiled,
    spike_limit,
)
from qwen_analog.progress import finish
from qwen_analog.train_config import TrainConfig


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def block(*sources):
    return TokenSequence(None, None, None, list(sources))


def log_of(steps, directory="run", **options):
    log = RunLog(directory, **{"tensorboard": False, **options})
    for step in steps:
        log.log_documents(step, {"position": step}, [block(f"d.jsonl:{step}")])
        log.log_metrics(step, loss=5.0 / step)
    log.close()


TAILS = {
    "half a line": lambda line: line[: len(line) // 2],
    "all but its end": lambda line: line[:-2],
    "zeros": lambda line: b"\0" * 300,
    "zeros and an end": lambda line: b"\0" * 300 + b"\n",
    "half a character": lambda line: b'{"step": 3, "x": "\xc3',
    "no object": lambda line: b"3\n",
    "many brackets": lambda line: b"[" * 100_000,
    "several": lambda line: b"\n\n{\n" + line[:9] + b"\n\0",
}


@pytest.mark.parametrize("label", TAILS)
def test_a_torn_end_is_left_out_and_written_over(label):
    log_of([1, 2, 3])
    for name in ("metrics.jsonl", "ledger/rank_0.jsonl"):
        lines = Path("run", name).read_bytes().splitlines(True)
        Path("run", name).write_bytes(b"".join(lines[:2]) + TAILS[label](lines[2]))
        assert [entry["step"] for entry in log_entries(Path("run", name))] == [1, 2]
    plot_losses("run/metrics.jsonl", "loss.png")
    with pytest.raises(ValueError, match="the ledger in run has no step 3"):
        documents_of_step("run", 3)
    log_of([3, 4])
    for name in ("metrics.jsonl", "ledger/rank_0.jsonl"):
        assert [
            json.loads(line)["step"]
            for line in Path("run", name).read_text().splitlines()
        ] == [1, 2, 3, 4]
    assert documents_of_step("run", 3) == ["d.jsonl:3"]


def test_a_last_line_that_lacks_its_end_only_is_kept():
    log_of([1, 2])
    file = Path("run/metrics.jsonl")
    file.write_bytes(file.read_bytes()[:-1])
    assert [entry["step"] for entry in log_entries(file)] == [1, 2]
    log_of([3])
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [
        1,
        2,
        3,
    ]


def test_an_empty_file_and_one_of_zeros_are_begun_anew():
    for content in (b"", b"\0" * 5000, b"\n"):
        Path("metrics.jsonl").write_bytes(content)
        assert list(log_entries("metrics.jsonl")) == []
        plot_losses("metrics.jsonl", "loss.png")
        log_of([1], directory=".")
        assert Path("metrics.jsonl").read_text() == '{"step": 1, "loss": 5.0}\n'


def test_lines_torn_in_the_middle_hide_no_others():
    """As an earlier version left them, which appended to a torn line."""
    lines = [
        '{"step": 1, "loss": 2.0}\n',
        "\0" * 50 + '{"step": 2, "loss": 1.5}\n',
        '{"step": 3, "lo{"step": 3, "loss": 1.0}\n',
        '{"step": 4, "loss": 0.5}\n',
    ]
    Path("metrics.jsonl").write_text("".join(lines))
    assert [entry["step"] for entry in log_entries("metrics.jsonl")] == [1, 2, 4]
    plot_losses("metrics.jsonl", "loss.png")


@pytest.mark.parametrize(
    "entry",
    [
        {"world_size": 1},
        {"world_size": "x", "documents": {}},
        {"world_size": 1, "documents": [1]},
        {"world_size": 1, "documents": {"d.jsonl": ["x"]}},
        {"world_size": None, "documents": {}},
    ],
)
def test_a_ledger_that_no_run_has_written_is_one_line(entry):
    Path("run/ledger").mkdir(parents=True)
    Path("run/ledger/rank_0.jsonl").write_text(json.dumps({"step": 1, **entry}) + "\n")
    with pytest.raises(
        ValueError,
        match=(
            "run/ledger/rank_0.jsonl: the entry of step 1 is not one that a run writes"
        ),
    ):
        documents_of_step("run", 1)


def test_a_ledger_of_many_ranks_ends_at_the_first_that_is_missing():
    Path("run/ledger").mkdir(parents=True)
    Path("run/ledger/rank_0.jsonl").write_text(
        '{"step": 1, "world_size": 1000000000000, "documents": {}}\n'
    )
    with pytest.raises(ValueError, match="the ledger in run has no step 1 of rank 1"):
        documents_of_step("run", 1)


@pytest.mark.parametrize("name", ["metrics.jsonl", "ledger/rank_0.jsonl"])
def test_a_full_disk_names_the_file(name):
    Path("run/ledger").mkdir(parents=True)
    Path("run", name).symlink_to("/dev/full")
    log = RunLog("run", tensorboard=False)
    with pytest.raises(
        OSError, match=rf"^run/{name} cannot be written: \[Errno 28\]"
    ) as raised:
        log.log_documents(1, {}, [])
        log.log_metrics(1, loss=1.0)
    log.close()  # nothing is held back that could fail once more
    assert "\n" not in str(raised.value)


def test_what_is_in_the_way_is_named():
    Path("file").touch()
    Path("run/metrics.jsonl").mkdir(parents=True)
    for directory in ("run", "file/run"):
        with pytest.raises(
            OSError, match=f"^{directory}/metrics.jsonl cannot be written"
        ):
            RunLog(directory).log_metrics(1, loss=1.0)


LIMITED = """
import resource, sys
from qwen_analog.monitor import RunLog
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
log = RunLog("run")
try:
    for step in range(1, 1000):
        if step == 1:
            log.log_metrics(1, loss=1.0)
        else:
            log._board.add_scalar("loss", 1.0, step)
except OSError as error:
    print(error)
log.close()
"""


def test_a_full_disk_under_tensorboard_is_one_line_too():
    done = subprocess.run(
        [sys.executable, "-c", LIMITED],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("\n") == 1
    assert (
        done.stdout.startswith("run/tensorboard/events.out.tfevents")
        and "cannot be written: [Errno 27] File too large" in done.stdout
    )


def test_tensorboard_reads_what_is_written_and_drops_what_was_taken_back():
    log_of([1, 2, 3, 4], tensorboard=True)
    log_of([3, 4, 5], tensorboard=True)
    RunLog("run").log_metrics(
        6, loss=math.nan, text="no number"
    )  # in the file when `write` returns
    events = EventAccumulator("run/tensorboard").Reload()
    assert [event.step for event in events.Scalars("loss")] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ] and math.isnan(events.Scalars("loss")[-1].value)


def test_numbers_that_are_not_finite_are_null():
    RunLog("run", tensorboard=False).log_metrics(
        1, loss=math.nan, grad_norm=math.inf, rate=0.5
    )
    assert (
        Path("run/metrics.jsonl").read_text()
        == '{"step": 1, "loss": null, "grad_norm": null, "rate": 0.5}\n'
    )


def test_new_directories_are_on_the_disk(monkeypatch):
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(
        os,
        "fsync",
        lambda handle: (
            flushed.append(os.readlink(f"/proc/self/fd/{handle}")),
            fsync(handle),
        ),
    )
    here = Path.cwd()
    log = RunLog("a/run", tensorboard=False)
    log.log_documents(1, {}, [])
    log.log_metrics(1, loss=1.0)
    assert {str(here), str(here / "a"), str(here / "a/run")} <= set(
        flushed
    )  # where the new directories' entries are


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"step": 1}],
        [{"step": 1, "loss": None}],
        [{"step": "x", "loss": 1.0}],
        [{"step": 1, "loss": math.nan}],
        [{"step": 10**400, "loss": 1}, {"step": 2, "loss": -math.inf}],
        [{"step": 1, "heldout_loss": [1]}],
        [{"step": 1, "loss": 1.0}],
    ],
)
def test_any_metrics_give_a_picture(lines):
    Path("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_losses("metrics.jsonl", "loss.png")
    assert Path("loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_curve_leaves_out_what_a_continued_run_took_back(monkeypatch):
    curves = {}
    drawn = lambda figure, *_, **__: curves.update(
        (line.get_label(), line.get_xydata().tolist()) for line in figure.axes[0].lines
    )
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", drawn)
    log = RunLog(".", tensorboard=False)
    for step in (1, 2, 3, 4, 5):
        log.log_metrics(step, loss=float(step))
        log.log_metrics(step, heldout_loss=step + 0.5)
    log.log_metrics(3, skipped="by skip_steps")  # continued from step 2
    log.log_metrics(4, loss=40.0)  # and stopped again before step 5
    log.close()
    plot_losses("metrics.jsonl", "loss.png")
    assert curves == {
        "training": [[1, 1], [2, 2], [4, 40]],
        "held out": [[1, 1.5], [2, 2.5]],
    }


def test_an_axis_says_what_the_loss_is_a_mean_of(monkeypatch):
    labels = []
    drawn = lambda figure, *_, **__: labels.append(figure.axes[0].get_ylabel())
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", drawn)
    log_of([1], directory=".")
    plot_losses("metrics.jsonl", "loss.png")
    for method in ("sft", "dpo", "grpo"):
        config = TrainConfig.create({"method": method, "output_dir": "."})
        finish(config, {"step": 1})
    assert labels == ["loss, nats a token"] * 2 + [
        "loss, nats a pair",
        "loss, mean of answers",
    ]


def test_a_picture_that_cannot_be_written_is_named():
    Path("metrics.jsonl").touch()
    Path("loss.png").mkdir()
    Path("full.png").symlink_to("/dev/full")
    for name in ("loss.png", "full.png"):
        with pytest.raises(OSError, match=f"^{name} cannot be written"):
            plot_losses("metrics.jsonl", name)


def test_a_trace_that_cannot_be_written_ends_no_run(capsys):
    Path("run").touch()
    with profiled("run", 0, 1) as step:
        for _ in range(4):
            step()
    said = capsys.readouterr().err
    assert (
        "warning: run/trace_rank_0.json cannot be written" in said
        and "Traceback" not in said
    )
    for steps in (-1, 1.5, math.nan, True):
        with (
            pytest.raises(ValueError, match="^steps must be a whole number"),
            profiled("run", 0, steps),
        ):
            pass


def test_a_file_is_appended_to_whole():
    file = LogFile(Path("new/x.bin"))
    file.write(b"a" * 100_000)
    file.close()
    LogFile(Path("new/x.bin")).write(b"b")
    assert (
        Path("new/x.bin").read_bytes() == b"a" * 100_000 + b"b"
    )  # records, which end in no line, stay


def falling(steps, seed=0):
    g = torch.Generator().manual_seed(seed)
    t = torch.arange(steps)
    return (
        2.5
        + 7 * (1 + t / 20) ** -0.5
        + 0.1 * torch.randn(steps, generator=g, dtype=torch.float64)
    ).tolist()


def test_the_detector_is_quiet_on_a_noisy_falling_loss_and_hears_a_jump():
    losses, detector = falling(20_000), LossSpikeDetector()
    alarms = sum(detector.update(loss) for loss in losses)
    assert alarms <= 2
    assert not detector.update(losses[-1] - 1.5)  # a step down is good news
    assert detector.update(losses[-1] + 1.0) and detector.update(
        losses[-1] + 1.0
    )  # the first does not hide the second
    for at in range(200, 1000, 97):
        detector = LossSpikeDetector()
        assert not any([detector.update(loss) for loss in losses[:at]])
        assert detector.update(max(losses[at - 64 : at]) + 1.0), at
    detector = LossSpikeDetector()
    assert not any(
        detector.update(loss) for loss in losses[:63]
    ) and not detector.update(100.0)  # too early to know


def test_one_bad_loss_does_not_move_the_limit():
    calm, after_a_spike = [3.1, 3.0, 3.2, 3.0, 3.1], [3.0, 3.2, 3.0, 3.1, 6.0]
    for losses in (calm, after_a_spike):
        assert spike_limit(losses) == pytest.approx(3.1 + 6 * 1.4826 * 0.1)
    assert spike_limit(calm, threshold=2.0) == pytest.approx(3.1 + 2 * 1.4826 * 0.1)
    for level in (2.0, -2.0):  # equal losses: a thousandth counts as deviation
        assert spike_limit([level] * 9) == pytest.approx(level + 6 * 0.002)


def test_the_detector_gets_used_to_a_new_level():
    detector = LossSpikeDetector(window=10)
    heard = [detector.update(loss) for loss in [1.0] * 10 + [2.0] * 20]
    assert heard[10:15] == [True] * 5 and not any(heard[:10] + heard[20:])
    assert not detector.update(2.01) and detector.update(
        2.02
    )  # equal losses: a thousandth counts as deviation


def test_the_detector_reports_what_is_not_finite_and_forgets_it():
    detector, plain, losses = (
        LossSpikeDetector(window=20),
        LossSpikeDetector(window=20),
        falling(100),
    )
    for i, loss in enumerate(losses):
        if i % 10 == 0:
            assert all(
                detector.update(bad) is True for bad in (math.nan, math.inf, -math.inf)
            )
        assert detector.update(loss) is plain.update(loss)
    assert detector.state_dict() == plain.state_dict()


def test_the_detector_resumes_exactly():
    losses = falling(300) + [9.0, 4.0, 9.0]
    for cut in (0, 5, 64, 200, 301):
        detector, resumed = LossSpikeDetector(), LossSpikeDetector()
        for loss in losses[:cut]:
            detector.update(loss)
        state = detector.state_dict()
        assert all(type(value) is float for value in state["losses"])
        resumed.load_state_dict(copy.deepcopy(state))
        assert [detector.update(loss) for loss in losses[cut:]] == [
            resumed.update(loss) for loss in losses[cut:]
        ]
        assert resumed.state_dict() == detector.state_dict()


@pytest.mark.parametrize(
    "wrong", [{"window": 1}, {"threshold": 0.0}, {"threshold": math.nan}]
)
def test_the_detector_refuses_senseless_settings(wrong):
    with pytest.raises(ValueError, match=str(*wrong.values())):
        LossSpikeDetector(**wrong)


class OneBlockOnly(RunLog):
    def log_documents(self, step, position, sequences):
        super().log_documents(step, position, sequences[:1])


class EveryRankWrites(RunLog):
    def log_metrics(self, step, **values):
        self._append("metrics.jsonl", {"step": step, **values})


class FirstEntryCounts(RunLog):
    def log_documents(self, step, position, sequences):
        path = Path(self.output_dir, f"ledger/rank_{self.rank}.jsonl")
        if not path.exists() or f'"step": {step},' not in path.read_text():
            super().log_documents(step, position, sequences)


def check_log(log_class):
    log = log_class("checked", 0, 2, tensorboard=False)
    other = log_class("checked", 1, 2, tensorboard=False)
    first, second = [block("d:1"), block("d:2")], [block("d:3"), block("d:4")]
    for step in (1, 11, 2):
        log.log_documents(step, {"position": step}, first if step == 2 else second)
        other.log_documents(step, {"position": step}, second)
    log.log_documents(1, {"position": 1}, first)  # once more, after an interruption
    log.log_metrics(1, loss=2.0)
    other.log_metrics(1, loss=3.0)
    log.close()
    other.close()
    everything = ["d:1", "d:2", "d:3", "d:4"]
    assert documents_of_step("checked", 2) == everything, "documents are missing"
    assert documents_of_step("checked", 1) == everything, "the earlier entry counts"
    lines = Path("checked/metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert entries == [{"step": 1, "loss": 2.0}], "metrics of another rank"


def test_the_log_itself_passes():
    check_log(RunLog)


@pytest.mark.mutant
@pytest.mark.parametrize(
    ("mutant", "reason"),
    [
        (OneBlockOnly, "documents are missing"),
        (EveryRankWrites, "metrics of another rank"),
        (FirstEntryCounts, "the earlier entry counts"),
    ],
)
def test_a_mutant_log_is_noticed(mutant, reason):
    with pytest.raises(AssertionError, match=reason):
        check_log(mutant)
