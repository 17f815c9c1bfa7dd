"""One answer of a served model, streamed through the official openai client."""

from collections.abc import Iterator

from openai import OpenAI, OpenAIError


def stream_answer(address: str, model: str, question: str, *, max_tokens: int) -> Iterator[str]:
    """Yield the pieces of text of the model's greedy answer to one user message.

    Args:
        address: of the server, without /v1.

    Raises:
        RuntimeError: the server refused the question or did not answer.
    """
    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    try:
        with client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
        ) as stream:
            for chunk in stream:
                if chunk.choices and (piece := chunk.choices[0].delta.content):
                    yield piece
    except OpenAIError as error:
        raise RuntimeError(f"{address} did not answer: {error}") from error
    finally:
        client.close()
