"""A `transformers.Trainer` that also says what every training sample did to a validation loss."""

from __future__ import annotations

from ghostfunc.hf._mixin import GhostMixin


class GhostTrainer(GhostMixin):
    """`transformers.Trainer` with a value for every training sample.

        trainer = gf.hf.GhostTrainer(model=model, args=args, train_dataset=train,
                                     score_dataset=val)
        trainer.train()
        trainer.scores              # and <output_dir>/scores.parquet

    The weights are those that `Trainer` would train, up to rounding: the same loss with the same
    weighting, dropout with the same draws, clipping, schedule, callbacks, progress bar,
    checkpoints. At the first step the samples' losses are held against the loss Trainer would
    train, and against its loss of every score dataset. The value of a sample is that of
    `gf.shapley.step`, summed over its steps: what it changed the loss of `score_dataset` by.
    NEGATIVE VALUES LOWERED THE LOSS.

    Args:
        *args, **kwargs: those of `Trainer`. The model may be a `PeftModel`.
        score_dataset: a dataset like `train_dataset`, map-style or iterable, or a dict of several,
            each a column of scores. Every optimizer step is scored against
            `per_device_eval_batch_size` samples of each, in order, starting over at the end. Their
            loss is the mean over their items (tokens of a language model), in evaluation mode.
        score_form: "sgd": `-lr weight <g_i, u>`, the score of plain SGD, in one pass (with a
            learning rate per parameter group, if there are several).
            "previous_state": through the optimizer, from its moments before the step, in one pass.
            "exact": through the optimizer and the clipping, at the step's own gradient; factors of
            all micro-batches of the step are kept in memory.
        score_order: 1, or 2 for "sgd" and "exact": with the curvature of the score loss.
        score_batch_size: how many score samples go through the model at once; all of a step by
            default. With 1, samples of different lengths need no padding.
        sample_loss: for models whose loss is not known here, either `f(module, batch) -> [n]`,
            whose mean over a batch is the loss that the model returns; or
            `gf.hf.SampleLoss(sums, counts)`, whose sums divided by the number of items (tokens) of
            the batch are.
        id_column: the column with an integer id of every sample; by default the index in
            `train_dataset`.
        compile: run the pass of the one-pass forms as one compiled program (`torch.compile`), as
            `torch_compile=True` does; random numbers of a model with dropout are then others than
            without.
        log_gradients: log quantiles of the samples' gradient norms, and the cosine of the step's
            and the score set's gradient, too: at the cost of norms in every pass and of another
            pass over the score samples.

    The table has the columns `sample_id`, `steps` (how often it was trained on) and `value_<name>`
    per score dataset (`value_score` for a single one); it is written also where an exception ends
    the run. Beside every training loss are logged `ghost/harmful_share` and `ghost/mean_value` of
    the samples since the last (`ghost/<name>/...` of several score datasets). Checkpoints hold the
    scores so far. `train(resume_from_checkpoint=True)` goes on from the newest whole checkpoint,
    and says which it passed over; from one of a plain Trainer, scores begin there.

    Under `torchrun` or `accelerate launch` (DistributedDataParallel) every process is given other
    samples, and all the same score samples. The table has the samples of all processes, and so has
    every checkpoint: a run can be resumed with another number of processes. So it is with FSDP2,
    of accelerate or of `from_pretrained(distributed_config=...)`, for `score_form` "sgd" and
    "previous_state" of order 1, in float32, without `compile` and `log_gradients`.

    Raises:
        OptionError: what this trainer does not do: several devices in one process, DeepSpeed,
            FSDP1, NEFTune, Liger kernels; a resumed run with another
            `score_form`, order, score dataset or training dataset than its checkpoint's; a
            checkpoint whose scores are damaged.
        VerificationError: the sample losses do not add up to the loss Trainer would train.
        RankError: of several processes, another one failed or is gone. All end, and name it.
    """
