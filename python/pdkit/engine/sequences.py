"""From the body of an HTTP request to its sequences: batches, and several samples of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pdkit.engine.fields import BadRequest
from pdkit.engine.request import SamplingParams

ROOMS = 1 << 63  # routers draw bootstrap rooms below it


@dataclass(frozen=True)
class Ask:
    """One sequence to generate, as `/generate` describes it; exactly one of text and ids is set."""

    params: SamplingParams
    text: str | None = None
    ids: list[int] | None = None
    rid: str | None = None
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    bootstrap_host: str | None = None
    bootstrap_port: int | None = None
    bootstrap_room: int | None = None
    extra_key: str | None = None


def fan_out(
    prompts: Sequence[Any],
    params: SamplingParams | list[SamplingParams],
    is_batch: bool,
    rid: str | list[str] | None = None,
    bootstrap_room: int | list[int] | None = None,
    **fields: Any,
) -> list[Ask]:
    """One Ask a sequence: params.n of each prompt, next to each other. Raises BadRequest.

    prompts: texts or lists of ids. params: SamplingParams of all, or a list. is_batch: False if the client sent a
    prompt and no list of them. fields: of Ask; a value for all or a list with one a prompt, None for the default.
    Of bootstrap fields there may be one a sequence, as the Rust router sends for n > 1: those of the prompts count,
    which are the first, as in SGLang's `GenerateReqInput`.
    """
    if not prompts:
        raise BadRequest("the batch is empty")
    count = len(prompts)
    params_of = _spread("sampling_params", params, count)
    numbers = {each.n for each in params_of}
    if len(numbers) > 1:
        raise BadRequest("n must be the same for every prompt of a batch")
    samples = numbers.pop()

    def of_prompts(name: str, value: Any) -> list[Any]:
        per_sequence = isinstance(value, list) and name.startswith("bootstrap_") and len(value) == count * samples
        if isinstance(value, list) and (
            samples > 1 and "logprob" in name or name == "extra_key" and not is_batch and samples == 1
        ):
            raise BadRequest(f"{name} must be one value here, not a list", name)
        return _spread(name, value[:count] if per_sequence else value, count)

    columns = {name: of_prompts(name, value) for name, value in fields.items()}
    if isinstance(bootstrap_room, int):  # prefill and decode derive the same ones from it
        bootstrap_room = [bootstrap_room + index for index in range(count)]
    first_rooms = of_prompts("bootstrap_room", bootstrap_room)
    rids = _rids(rid, count, samples, is_batch)
    rooms = [None if room is None else room + sample * ROOMS for room in first_rooms for sample in range(samples)]
    asks = []
    for index, prompt in enumerate(prompts):
        given = {name: column[index] for name, column in columns.items() if column[index] not in (None, "")}
        given["text" if isinstance(prompt, str) else "ids"] = prompt
        for place in range(index * samples, (index + 1) * samples):
            asks.append(Ask(params_of[index], **given, rid=rids[place], bootstrap_room=rooms[place]))
    return asks


def _spread(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise BadRequest(f"{name} has {len(value)} entries for {count} prompts", name)
    return value


def _rids(rid: str | list[str] | None, count: int, samples: int, is_batch: bool) -> list[str | None]:
    if isinstance(rid, str) and (is_batch or samples > 1):
        return [f"{rid}_{index}" for index in range(count * samples)]
    rids = _spread("rid", rid, count)
    if rid is not None and len(set(rids)) < count:
        raise BadRequest(f"rid names one id twice: {rid}")
    return rids if samples == 1 else [None] * (count * samples)
