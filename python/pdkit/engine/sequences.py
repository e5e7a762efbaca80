"""From the body of an HTTP request to its sequences: batches, and several samples of a prompt."""

from dataclasses import dataclass

from pdkit.engine.request import BadRequest, SamplingParams

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


def fan_out(prompts, params, is_batch, rid=None, bootstrap_room=None, **fields):
    """One Ask a sequence: params.n of each prompt, next to each other. Raises BadRequest.

    prompts: texts or lists of ids. params: SamplingParams of all, or a list. is_batch: False if the client sent a
    prompt and no list of them. fields: of Ask; a value for all or a list with one a prompt, None for the default.
    Of bootstrap fields there may be one a sequence, as the Rust router sends for n > 1: those of the prompts count,
    which are the first, as in SGLang's `GenerateReqInput`.
    """
    if not prompts:
        raise BadRequest("the batch is empty")
    count = len(prompts)
    params = _spread("sampling_params", params, count)
    numbers = {each.n for each in params}
    if len(numbers) > 1:
        raise BadRequest("n must be the same for every prompt of a batch")
    samples = numbers.pop()

    def of_prompts(name, value):
        per_sequence = isinstance(value, list) and name.startswith("bootstrap_") and len(value) == count * samples
        return _spread(name, value[:count] if per_sequence else value, count)

    bootstrap_room = (
        of_prompts("bootstrap_room", bootstrap_room) if isinstance(bootstrap_room, list) else bootstrap_room
    )
    columns = {name: of_prompts(name, value) for name, value in fields.items()}
    rids, rooms = _rids(rid, count, samples, is_batch), _rooms(bootstrap_room, count, samples)
    asks = []
    for index, prompt in enumerate(prompts):
        given = {name: column[index] for name, column in columns.items() if column[index] is not None}
        given["text" if isinstance(prompt, str) else "ids"] = prompt
        asks += [Ask(params[index], **given, rid=rids.pop(0), bootstrap_room=rooms.pop(0)) for _ in range(samples)]
    return asks


def _spread(name, value, count):
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise BadRequest(f"{name} has {len(value)} entries for {count} prompts")
    return value


def _rids(rid, count, samples, is_batch):
    if isinstance(rid, str) and (is_batch or samples > 1):
        return [f"{rid}_{index}" for index in range(count * samples)]
    rids = _spread("rid", rid, count)
    if rid is not None and len(set(rids)) < count:
        raise BadRequest(f"rid names one id twice: {rid}")
    return rids if samples == 1 else [None] * (count * samples)


def _rooms(room, count, samples):
    """Prefill and decode derive the same rooms, from one number a prompt or from one for all."""
    rooms = _spread("bootstrap_room", room, count)
    if isinstance(room, int):
        rooms = [room + index for index in range(count)]
    return [None if each is None else each + sample * ROOMS for each in rooms for sample in range(samples)]
