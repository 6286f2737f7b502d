"""Calls of a server with a client library, run by `test_client_libraries.py` in the environment of the clients.

    python calls.py langchain http://127.0.0.1:8000 "What is the capital of France?"

Prints one JSON object with the answers.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

SETTINGS = {"temperature": 0, "max_tokens": 12}


def langchain(url: str, question: str) -> dict[str, Any]:
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI, OpenAI

    chat = ChatOpenAI(model="cappy", base_url=f"{url}/v1", api_key="none", max_retries=0, **SETTINGS)
    text = OpenAI(model="cappy", base_url=f"{url}/v1", api_key="none", max_retries=0, **SETTINGS)
    first = chat.invoke([HumanMessage(question)])
    refused = ""
    try:
        chat.bind_tools([{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]).invoke(
            question
        )
    except Exception as error:
        refused = str(error)
    return {
        "chat": first.content,
        "usage": first.usage_metadata["output_tokens"],
        "stream": "".join(chunk.content for chunk in chat.stream(question)),
        "turns": chat.invoke([SystemMessage("Be brief."), HumanMessage(question, name="Ann"), first, HumanMessage("Again.")]).content,
        "prefill": chat.invoke([HumanMessage(question), AIMessage("The")]).content,
        "texts": [each[0].text for each in text.generate([question, "One, two,"]).generations],
        "tools": refused,
    }


def litellm(url: str, question: str) -> dict[str, Any]:
    import litellm as client

    there = {"api_base": f"{url}/v1", "api_key": "none", **SETTINGS}
    messages = [{"role": "user", "content": question}]
    first = client.completion(model="openai/cappy", messages=messages, **there)
    turns = [*messages, first.choices[0].message.model_dump(), {"role": "user", "content": "Again."}]
    stream = client.completion(model="openai/cappy", messages=messages, stream=True, **there)
    texts = client.text_completion(model="text-completion-openai/cappy", prompt=[question, "One, two,"], **there)
    scorer = {"model": "cohere/cappy-scorer", "api_base": f"{url}/v2/rerank", "api_key": "none"}
    ranked = client.rerank(query=question, documents=["Paris", "a fox", "London"], top_n=2, **scorer)
    return {
        "chat": first.choices[0].message.content,
        "usage": first.usage.completion_tokens,
        "stream": "".join(chunk.choices[0].delta.content or "" for chunk in stream),
        "turns": client.completion(model="openai/cappy", messages=turns, **there).choices[0].message.content,
        "texts": [choice.text for choice in texts.choices],
        "ranked": [each["index"] for each in ranked.results],
        "billed": ranked.meta["billed_units"]["search_units"],
    }


def llamaindex(url: str, question: str) -> dict[str, Any]:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    there = {"model": "cappy", "api_base": f"{url}/v1", "api_key": "none", "max_retries": 0, **SETTINGS}
    chat = OpenAILike(is_chat_model=True, **there)
    messages = [ChatMessage(role="user", content=question)]
    return {
        "chat": chat.chat(messages).message.content,
        "stream": "".join(chunk.delta or "" for chunk in chat.stream_chat(messages)),
        "texts": [OpenAILike(is_chat_model=False, **there).complete(question).text],
    }


if __name__ == "__main__":
    calls: dict[str, Callable[[str, str], dict[str, Any]]] = {"langchain": langchain, "litellm": litellm, "llamaindex": llamaindex}
    print(json.dumps(calls[sys.argv[1]](*sys.argv[2:])))
