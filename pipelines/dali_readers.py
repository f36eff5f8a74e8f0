"""DALI's own readers: DALI reads, shuffles and draws the crops; colours stay ours.

For a comparison with pipelines that work so, and for shards that are best read from end to end. Only DALI knows what
comes next, so an epoch goes on where the last one ended or where a checkpoint was written, with as many ranks.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Generator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pipelines.dali_pipelines import Engine, dali
from pipelines.dali_stored import OURS_CAN, READER, stored_for_dali
from pipelines.loading import Crops, StreamedLoader
from pipelines.stored.images import DataError
from pipelines.unchanged import check_unchanged

Place = tuple[int, int]  # epoch, and the step of it that comes next


class DaliReader:
    """The batches of one rank, as DALI's reader for the kind of source gives them.

    In an epoch DALI shows every image once, over all ranks, in ceil(images / batch_size) batches a rank. Where images
    are left over by whole batches, the last batch is filled up with repetitions of the rank's last image. `last: drop`
    throws that batch away, so what it held is not seen in this epoch; `last: pad` uses it, repetitions and all.
    `order` has no effect, and pixels are as DALI decodes them: CMYK or transparency may look otherwise than elsewhere.

    Raises:
        DataError: a source, split or view that DALI's readers cannot serve; `data.reader=ours` can.
    """

    def __init__(self, loader: StreamedLoader, engine: Engine) -> None:
        for number, view in enumerate(loader.plan):
            if view.crop != "random_resized":
                raise DataError(
                    f"data.reader=dali draws random_resized crops only, but view {number} has crop={view.crop}; "
                    + OURS_CAN
                )
        self.loader, self.engine = loader, engine
        self._stored = stored_for_dali(loader)
        order = loader.order
        self.steps = order.steps
        self._dropped = -(-order.images // order.batch_size) - order.steps
        self._pipeline: Any = None
        self._pipeline_at: Place | None = None
        self._start: tuple[Place, bytes | None] = (0, 0), None  # of the consumer, and DALI's state there
        self._to_deliver: deque[tuple[Place, bytes | None]] = deque()

    def crops(self, epoch: int, first_step: int) -> Generator[Crops, None, None]:
        """The batches from a step on; may be ahead of the consumer, who calls `delivered` for each that it gets.

        Raises:
            DataError: this is neither the beginning nor where the consumer, or the loaded state, stands.
        """
        if first_step >= self.steps:
            return
        self._go_to((epoch, first_step))
        if first_step == 0 and epoch > 0:
            for _ in range(self._dropped):
                self._next()
        for step in range(first_step, self.steps):
            indices, crops = self._next()
            self._pipeline_at = (epoch, step + 1) if step + 1 < self.steps else (epoch + 1, 0)
            self._to_deliver.append((self._pipeline_at, self._checkpoint))
            yield Crops(crops, indices)

    def delivered(self) -> None:
        """The consumer has the next batch: a checkpoint written now begins after it."""
        self._start = self._to_deliver.popleft()

    def state(self) -> Tensor:
        """[n] uint8: what `load_state` needs."""
        (epoch, step), checkpoint = self._start
        header = json.dumps({"epoch": epoch, "step": step, "facts": self._facts}).encode()
        whole = len(header).to_bytes(8, "little") + header + (checkpoint or b"")
        return torch.frombuffer(bytearray(whole), dtype=torch.uint8)

    def load_state(self, state: Tensor) -> None:
        """Go on after the batch at which `state` was made.

        Raises:
            DataError: it was made otherwise; DALI itself would take it and give other images, without a word.
        """
        data = state.cpu().numpy().tobytes()
        end = 8 + int.from_bytes(data[:8], "little")
        try:
            header = json.loads(data[8:end])
            place, facts = (int(header["epoch"]), int(header["step"])), dict(header["facts"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError("this is no state of data.reader=dali; it was written by another loader") from error
        own = self._facts
        different = [key for key in sorted(own.keys() | facts.keys()) if own.get(key) != facts.get(key)]
        if different:
            told = ", ".join(f"{key} {facts.get(key)} (now {own.get(key)})" for key in different)
            raise DataError(
                f"the checkpoint of data.reader=dali was written with {told}; resume with the same, or start a new run"
                " with data.reader=ours, which resumes anywhere"
            )
        self.close()
        self._start = place, data[end:] or None

    def close(self) -> None:
        self._pipeline = self._pipeline_at = None

    def _go_to(self, place: Place) -> None:
        """Have a pipeline whose next batch is the one at `place`."""
        self._to_deliver.clear()
        if self._pipeline is not None and self._pipeline_at == place:
            return
        start, checkpoint = self._start
        if place == (0, 0):
            checkpoint = None
        elif place != start:
            raise DataError(
                f"data.reader=dali stands at step {start[1]} of epoch {start[0]} and cannot go to step {place[1]} of"
                f" epoch {place[0]}: only DALI knows what comes there; load the checkpoint of that step, or " + OURS_CAN
            )
        self.close()
        self._pipeline = self._build(checkpoint)
        self._pipeline.schedule_run()

    def _next(self) -> tuple[Tensor, Tensor]:
        """(indices, crops) of the next batch; DALI's state after it is in `_checkpoint`."""
        pipeline, self._pipeline_at = self._pipeline, None  # unknown, should this fail
        try:
            index, *views = pipeline.share_outputs()
        except RuntimeError as error:
            check_unchanged(self.loader.source.images)  # says which file
            raise DataError(
                f"DALI cannot go on in {self.loader.source.name}: {error}; it does not say which image is broken: "
                "data.reader=ours does, and python -m tools.convert PATH --verify"
            ) from error
        self._checkpoint = pipeline.checkpoint()
        crops, indices = self.engine.joined(views), self._positions(index)
        pipeline.release_outputs()
        pipeline.schedule_run()
        return indices, crops

    def _build(self, checkpoint: bytes | None) -> Any:
        fn, types, loader = dali().fn, dali().types, self.loader
        side = [loader.size, loader.size]

        @dali().pipeline_def
        def crops() -> tuple[Any, ...]:
            encoded, index = self._stored.read(loader.rank, loader.world_size)
            image = self.engine.decode(encoded)
            made = [
                fn.random_resized_crop(
                    image,
                    size=side,
                    random_area=view.crop_scale,
                    random_aspect_ratio=view.crop_ratio,
                    interp_type=types.INTERP_LINEAR,
                    antialias=True,
                )
                for view in self.loader.plan
            ]
            return (index, *made)

        # Ranks see different images and must not cut them alike.
        name = f"{self.loader.seed} {self.loader.rank}".encode()
        built = crops(
            batch_size=self.loader.order.share,
            seed=int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "little"),
            enable_checkpointing=True,
            checkpoint=checkpoint,
            **self.engine.settings(),
        )
        try:
            built.build()
        except RuntimeError as error:
            raise DataError(
                f"DALI cannot read {loader.source.name}/{loader.source.split}: {error}; {OURS_CAN}, or convert the set"
                " again (python -m tools.convert)"
            ) from error
        held = built.reader_meta(READER)["epoch_size"]
        if held != loader.order.images:
            raise DataError(
                f"{loader.source.name}/{loader.source.split} has {loader.order.images:,} images, but its shards hold"
                f" {held:,}, and DALI's reader would show them all; {OURS_CAN}, or use all of them"
                " (data.holdout=0, no data.limit)"
            )
        return built

    def _positions(self, index: Any) -> Tensor:
        """[n] int64: positions in the source of the images whose stored numbers are in DALI's output `index`."""
        positions = self._stored.positions(index)
        if (positions < 0).any():
            raise DataError(
                f"the shards of {self.loader.source.name} hold an image that their index does not list; remove the"
                " *.index.npz to have it made again"
            )
        return torch.from_numpy(positions)

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """What DALI's state depends on, though it does not hold it."""
        loader = self.loader
        digest = hashlib.blake2b(digest_size=8)
        self._stored.feed(digest)
        facts = {
            "source": f"{loader.source.name}/{loader.source.split}",
            "images": loader.order.images,
            "their hash": digest.hexdigest(),
            "reader": self._stored.kind,
            "batch size": loader.order.batch_size,
            "shard": loader.rank,
            "ranks": loader.world_size,
            "steps": self.steps,
            "seed": loader.seed,
            "view size": loader.size,
            "crops": [[*view.crop_scale, *view.crop_ratio] for view in loader.plan],
            "decoder": "mixed" if self.engine.mixed else "cpu",
            "DALI": dali().__version__,
        }
        return json.loads(json.dumps(facts))
