"""OpenAI's two logprobs objects, as SGLang fills them."""

from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from pdkit.engine.request import Request

BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


def _bytes(tokenizer: Any, token: int) -> bytes:
    """What a token of a byte-level vocabulary stands for."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if all(character in BYTE_OF for character in piece):
        return bytes(BYTE_OF[character] for character in piece)
    return piece.encode()


def _text(tokenizer: Any, token: int) -> str:
    """Its text; a piece of a character is spelled as latin-1, so that different pieces differ."""
    raw = _bytes(tokenizer, token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def completion_logprobs(request: Request, start: int, with_prompt: bool = False) -> dict[str, Any]:
    """OpenAI's legacy logprobs object of the output tokens from index `start`; before them, if wanted, the prompt's."""
    tokenizer = request.tokenizer
    pairs = (request.input_logprobs if with_prompt else []) + request.output_logprobs[start:]
    rows = [*(request.input_top_logprobs if with_prompt else []), *request.output_top_logprobs[start:]]
    return {
        "text_offset": [-1] * len(pairs),
        "token_logprobs": [logprob for logprob, _ in pairs],
        "tokens": [_text(tokenizer, token) for _, token in pairs],
        "top_logprobs": [
            row and {_text(tokenizer, token): logprob for logprob, token in row}
            for row in rows
            if request.top_logprobs_num
        ],
    }


def chat_logprobs(request: Request, start: int, with_prompt: bool = False) -> dict[str, Any]:
    """OpenAI's chat logprobs object of the output tokens from index `start`; a chat has none of its prompt."""

    def entry(logprob: float | None, token: int) -> dict[str, Any]:
        raw = _bytes(request.tokenizer, token)
        return {"token": raw.decode(errors="replace"), "bytes": list(raw), "logprob": logprob}

    return {
        "content": [
            entry(*pair) | {"top_logprobs": [entry(*item) for item in top]}
            for pair, top in zip(request.output_logprobs[start:], request.output_top_logprobs[start:])
        ]
    }
