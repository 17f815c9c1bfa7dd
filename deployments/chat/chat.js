// A conversation with /v1/chat/completions: sends the turns so far, shows the answer as it comes.

import { Reads } from "./reads.js";

const element = (id) => document.getElementById(id);
const root = document.documentElement;
const messages = [];
let running = null;

function show(text, isError = false) {
  element("status").textContent = text;
  element("status").classList.toggle("error", isError);
}

function addTurn(role, text) {
  element("empty").hidden = true;
  const turn = document.createElement("div");
  turn.className = `turn ${role}`;
  turn.textContent = text;
  element("turns").append(turn);
  turn.scrollIntoView({ block: "end" });
  return turn;
}

function setRunning(controller) {
  running = controller;
  element("send").hidden = running !== null;
  element("stop").hidden = running === null;
}

// Yields the parsed events of a server-sent stream; an event may arrive in several reads.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const pieces = (pending + value).split("\n\n");
    pending = pieces.pop();
    for (const piece of pieces) {
      const data = piece.startsWith("data: ") ? piece.slice(6) : null;
      if (data === "[DONE]") return;
      if (data !== null) yield JSON.parse(data);
    }
  }
}

// The key is asked for where the server wants one, and kept as long as the tab is open.
function headers() {
  const key = sessionStorage.getItem("key");
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function problem(response) {
  if (response.status === 401) element("key-label").hidden = false;
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

function request() {
  const body = {
    model: element("model").value,
    messages,
    stream: true,
    stream_options: { include_usage: true },
  };
  const temperature = element("temperature").valueAsNumber;
  const maxTokens = element("max-tokens").valueAsNumber;
  if (!Number.isNaN(temperature)) body.temperature = temperature;
  if (!Number.isNaN(maxTokens)) body.max_tokens = maxTokens;
  if (element("show-reads").checked) body.nsa = { return_selected_blocks: true };
  return body;
}

// Fills the turn with the answer as it comes; returns a line about how it went.
async function fill(turn, controller) {
  const started = performance.now();
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: headers(),
    body: JSON.stringify(request()),
    signal: controller.signal,
  });
  if (!response.ok) throw new Error(await problem(response));
  let usage = null;
  let reads = null;
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    usage = event.usage ?? usage;
    const choice = event.choices[0];
    const text = choice?.delta.content;
    if (choice?.nsa?.prompt_blocks) {
      reads = new Reads(turn, choice.nsa.prompt_blocks, choice.nsa.block_size);
    }
    if (reads) reads.add(text ?? "", choice?.nsa?.selected_blocks ?? []);
    if (text) {
      if (!reads) turn.textContent += text;
      turn.scrollIntoView({ block: "end" });
    }
  }
  if (usage === null) throw new Error("The answer broke off.");
  const seconds = (performance.now() - started) / 1000;
  const rate = (usage.completion_tokens / seconds).toFixed(1);
  return `${usage.prompt_tokens} + ${usage.completion_tokens} tokens, ${rate} tokens/s`;
}

async function ask(question) {
  messages.push({ role: "user", content: question });
  const asked = addTurn("user", question);
  const turn = addTurn("assistant", "");
  const controller = new AbortController();
  turn.classList.add("streaming");
  setRunning(controller);
  show("");
  try {
    await modelsAreListed;
    show(await fill(turn, controller));
  } catch (error) {
    const isStopped = controller.signal.aborted;
    show(isStopped ? "Stopped." : error.message, !isStopped);
  } finally {
    turn.classList.remove("streaming");
    setRunning(null);
  }
  if (!asked.isConnected) return;
  if (turn.textContent) {
    messages.push({ role: "assistant", content: turn.textContent });
  } else {
    // A question without an answer is no part of the conversation: it can be edited and sent again.
    messages.pop();
    asked.remove();
    if (turn.nextElementSibling?.matches(".reads")) turn.nextElementSibling.remove();
    turn.remove();
    element("question").value ||= question;
  }
}

async function listModels() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw new Error(await problem(response));
  const { data } = await response.json();
  element("model").replaceChildren(...data.map((model) => new Option(model.id, model.id)));
  element("model").disabled = data.length < 2;
}

function useTheme(theme) {
  root.dataset.theme = theme;
  localStorage.setItem("theme", theme);
}

element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = element("question").value.trim();
  if (!question || running) return;
  element("question").value = "";
  ask(question);
});

element("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  element("ask").requestSubmit();
});

element("stop").addEventListener("click", () => running?.abort());

element("new").addEventListener("click", () => {
  running?.abort();
  messages.length = 0;
  element("turns").replaceChildren(element("empty"));
  element("empty").hidden = false;
  show("");
  element("question").focus();
});

element("theme").addEventListener("click", () => {
  const isDark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  useTheme(isDark ? "light" : "dark");
});

const kept = localStorage.getItem("theme");
if (kept) root.dataset.theme = kept;
let modelsAreListed;
function begin() {
  modelsAreListed = listModels();
  modelsAreListed.then(() => show(""), (error) => show(error.message, true));
}

element("key").addEventListener("change", () => {
  sessionStorage.setItem("key", element("key").value.trim());
  begin();
});
begin();
