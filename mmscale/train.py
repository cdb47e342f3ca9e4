"""The training loop, read top to bottom: next batch, forward, backward, step, log, evaluate, save.

`train(config)` runs one rank. It is the same function in one process, under torchrun and under Ray: who we are comes
from the environment (see `mmscale.world`). Killed at any time and called again, it goes on from the newest checkpoint
with the very next sample.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from mmscale_kernels import configs as kernel_configs

from mmscale import checkpoint
from mmscale.config import Config, Durations
from mmscale.data.batch import to_device
from mmscale.data.foreign import Pipeline
from mmscale.engine import Engine
from mmscale.errors import ConfigError, Preempted, UserError
from mmscale.evals.evaluate import evaluate
from mmscale.evals.report import write_report
from mmscale.guards import Guard, explain_skip, roll_back
from mmscale.heartbeat import Heartbeat
from mmscale.metrics import Event, LoaderMeter, Window, Writer, all_ranks, global_losses, mean_losses
from mmscale.optim import learning_rate
from mmscale.pipeline import check_world, drop_complete, micro_batches, open_run_data
from mmscale.runs import Run, StopRequest, open_run
from mmscale.saver import Saver
from mmscale.tasks import TASKS, schedule
from mmscale.world import World, close_world, init_world


def train(
    config: Config,
    on_event: Callable[[Event], None] | None = None,
    *,
    pipeline: Pipeline | None = None,
) -> dict[str, Any]:
    """Trains, evaluates before and after, and returns the report, which also lies in the run's folder.

    pipeline gives the training samples in place of data.train; `mmscale.data.foreign` says what is lost. on_event is
    called on rank 0 with what a terminal shows: {"event": "message" | "log" | "eval" | "save", ...}.
    Raises ConfigError, DataError, CheckpointError and Preempted (with a checkpoint saved), on every rank the same.
    """
    world = init_world(device=config.run.device, threads=config.run.threads, timeout=config.engine.timeout)
    run: Run | None = None
    beat = Heartbeat.from_environment()
    stop = StopRequest(beat.set_stop)
    try:
        check_world(config, world)
        run = open_run(config, world)
        run.emit = on_event if on_event is not None and world.rank == 0 else run.emit
        run.emit({"event": "start", "folder": str(run.folder.absolute())})
        report = _train(config, world, run, stop, beat, pipeline)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno:  # the disk, mostly, and a full one doesn't say which
            error = UserError(f"{error.filename or (run and run.folder)}: {error.strerror}")
        if run is not None:
            run.record(error)
        raise error from None if isinstance(error, UserError) else error.__cause__
    else:
        run.log(f"finished at step {report['step']}")
        return report
    finally:
        if run is not None:
            run.close()
        stop.close()
        close_world()


def _train(
    config: Config, world: World, run: Run, stop: StopRequest, beat: Heartbeat, pipeline: Pipeline | None
) -> dict[str, Any]:
    tasks = {name: TASKS[name]() for name, weight in config.tasks.items() if weight > 0}
    model, stream = open_run_data(config, tasks, world, pipeline)
    plan = Durations.of(config, stream.num_samples)
    total_steps, batch_size = plan.total_steps, config.data.batch_size

    found, problems = checkpoint.find(run.checkpoints, world)
    for problem in problems:
        run.say(f"checkpoints: {problem}")
    if found is None and config.run.resume == "must":
        raise ConfigError(f"run.resume=must: there is no checkpoint in {run.checkpoints}")
    universal = found is not None and checkpoint.needs_conversion(found, world.size, config.engine.zero_stage)
    num_parts = config.train.accumulation
    engine = Engine(
        model,
        config=config.engine,
        optim=config.optim,
        world=world,
        micro_batch=batch_size // (world.size * num_parts),
        accumulation=num_parts,
        universal=universal,
    )
    step, before_s, skipped = 0, 0.0, 0
    faults: dict[str, int] = {}  # before this start, by all ranks
    saver = Saver(
        engine,
        run.checkpoints,
        config=config,
        check_owner=run.check_owner,
        on_event=run.tell,
        attempt=run.attempt,
    )
    run.call_at_end(saver.close)
    guard = Guard(config.guard)
    if found is not None:
        checkpoint.load(engine, found, universal=universal)
        state = found.manifest["state"]
        step, before_s, skipped, faults = found.step, state["seconds"], state["skipped"], state["faults"]
        saver.last_saved = step
        guard.load_state(state["guard"])
        stream.load_state_dict(state["stream"])  # an error of it is the same on every rank
        run.say(f"resumed at step {step} from {found.path}")
        kernels = kernel_configs.record(world.device)
        if change := kernel_configs.changes(state.get("kernels", kernels), kernels):
            run.say(f"results may differ in their last bits from those of an uninterrupted run: {change}")
    else:
        run.say(f"{engine.describe()}; {stream.num_samples} samples, {batch_size} a step")

    for text in stream.notes():
        run.say(text)
    meter = LoaderMeter(stream, world, run.folder, counts=faults, step=step, budget=config.data.error_budget)
    writer = Writer(run.folder, resume_step=step, say=run.say) if world.rank == 0 else None

    if world.rank == 0:
        run.forget_keys(after=step)
    beat.resume_at(step=step, samples=step * batch_size)
    window = Window(before_s=before_s)
    pending: list[tuple[int, str, torch.Tensor]] = []  # the losses since the last log, on the device

    def run_evaluation(at: int) -> None:
        resume = window.pause()
        beat.phase("eval")
        run.say(f"evaluating at step {at} on {', '.join(config.data.evals)}")
        for name, shards in config.data.evals.items():
            results = evaluate(
                engine.deepspeed, engine.model, tasks, shards, config=config, world=world, on_batch=beat.beat
            )
            run.add_evaluation(at, name, results, writer)
        for when, value in run.scores(config.train.keep_best).items():
            saver.set_score(when, value)
        resume()

    def save(at: int, *, then_go_on: bool) -> None:
        resume = window.pause()
        beat.phase("save")
        if pending:
            each = global_losses(pending, world)
            checkpoint.check_finite(mean_losses(each), at, config.optim.lr, run.checkpoints)
            if guard.has_spiked(each, run.say):
                roll_back(engine, guard, saver, run, at)
                pending.clear()
        state = {
            "stream": stream.state_dict(),
            "seconds": window.total_s,
            "skipped": skipped,
            "faults": dict(meter.counts),
            "guard": guard.state(),
            "kernels": kernel_configs.record(world.device),
        }
        (saver.start if then_go_on else saver.save)(at, state)
        resume()

    if step == 0 and config.data.evals:
        run_evaluation(0)
    last_save = time.monotonic()
    batches = iter(stream)
    at_end = step == total_steps or (plan.total_s is not None and before_s >= plan.total_s)

    while not at_end:
        # Next batch. One small host-side sum tells every rank what it must know to do the same as the others.
        begin = time.perf_counter()
        beat.phase("data")
        batch, error = None, None
        try:
            batch = next(batches)
        except Exception as caught:
            error = caught
        wait = time.perf_counter() - begin
        name = schedule(config.tasks, step)
        task = tasks[name]
        parts = micro_batches(task, batch.tensors, num_parts) if batch is not None else []
        rows = sum(len(part["usable"]["x"]) for part in parts)
        weight = 1.0 if task.coupled else sum(task.weight(part) for part in parts)
        tokens = sum(model.modality(field).num_tokens(part[field]) for part in parts for field in task.fields)
        out_of_time = plan.total_s is not None and window.total_s >= plan.total_s and world.rank == 0
        late = plan.save_s is not None and time.monotonic() - last_save >= plan.save_s and world.rank == 0
        asked = world.rank == 0 and stop.by_file(run.folder)
        flags = [error is not None, stop.by_signal, asked, out_of_time, late, saver.poll() is not None]
        beat.phase("sync")
        sums = world.sum([*flags, rows, weight, tokens, wait, meter.num_new()])
        failed, signalled, asked, ended, save_now, settled = map(bool, sums[: len(flags)])
        all_rows, all_weight, all_tokens, all_wait, all_faults = sums[len(flags) :]
        stopped = signalled or asked
        if failed:
            world.agree(error)
        meter.record(all_faults, (step + 1) * batch_size)

        # Forward, backward, optimizer step.
        rate = learning_rate(config.optim, step, warmup_steps=plan.warmup_steps, total_steps=total_steps)
        if all_rows:
            beat.phase("forward")
            engine.set_learning_rate(rate)
            on_device = [to_device(drop_complete(part), world.device) for part in parts]
            result = engine.train_step(task, on_device, weight=all_weight, beat=beat)
            if result.applied:
                pending.append((step + 1, name, result.loss))
            else:
                assert batch is not None
                keys = batch.sample_keys
                run.say(explain_skip(engine, task, on_device, keys, step=step + 1, loss=result.loss))
            go_back = guard.after_step(step + 1, result.applied)
        else:
            skipped, go_back = skipped + 1, False
        step += 1
        beat.end_step(step=step, samples=step * batch_size)
        if config.train.log_keys and batch is not None:
            run.log_keys(step, batch.sample_keys)
        at_end = step == total_steps or ended
        window.add(samples=batch_size, tokens=round(all_tokens), wait_s=all_wait / world.size)

        # Log: the one place where the device is waited for.
        if pending and (step % config.train.log_every == 0 or at_end or stopped):
            each = global_losses(pending, world)
            losses = mean_losses(each)
            go_back = guard.has_spiked(each, run.say) or go_back
            rates = window.close()
            pending.clear()
            line = {
                "step": step,
                "samples": step * batch_size,
                "epoch": step * batch_size / stream.num_samples,
                "loss": losses["all"],
                "lr": rate,
                **rates,
                "mfu": None,
                "grad_norm": engine.gradient_norm,
                **all_ranks(beat, world),
                **meter.rates(step * batch_size),
                **guard.counts(),
                **{f"loss/{name}": value for name, value in losses.items() if name != "all"},
            }
            if writer is not None:
                writer.log(line)
            eta = (total_steps - step) * rates["step_s"] if total_steps is not None else None
            run.emit({"event": "log", "total_steps": total_steps, "eta_s": eta, **line})
            if advice := meter.warning(step, rates["data_wait_frac"], threads=config.data.threads):
                run.say(advice)
            if not go_back:
                checkpoint.check_finite(losses, step, config.optim.lr, run.checkpoints)
        if go_back:
            roll_back(engine, guard, saver, run, step)
            pending.clear()

        # Evaluate, save, stop.
        if plan.eval_steps and step % plan.eval_steps == 0 and not at_end:
            run_evaluation(step)
        if settled and (outcome := saver.settle()) is not None and outcome.error is not None:
            save_now = saver.num_failed == 1  # again at once, then when the next one is due
        if save_now or (plan.save_steps and step % plan.save_steps == 0 and not at_end) or stopped:
            save(step, then_go_on=not (stopped or at_end))
            last_save = time.monotonic()
        if stopped and not at_end:
            told = Preempted(f"stopped at step {step}, saved; the same command goes on from there")
            told.by_request = asked
            raise told

    if saver.last_saved != step:
        save(step, then_go_on=False)
    if config.data.evals:
        run_evaluation(step)
    report = {
        "step": step,
        "samples": step * batch_size,
        "train_seconds": window.total_s,
        "samples_per_s": step * batch_size / window.total_s if step else None,
        "world_size": world.size,
        "device": world.device.type,
        "steps_without_usable_samples": skipped,
        "substituted_samples": dict(meter.counts),
        "blend": stream.blend_report(),
        "kernels": kernel_configs.record(world.device),
        "evaluations": run.evaluations(),
        "folder": str(run.folder),
    }
    stream.close()
    if writer is not None:
        try:
            report = write_report(run, config, report, writer=writer)
            writer.close()
        except Exception as caught:
            error = caught
    world.agree(error)
    return world.gather(report)[0]
