// The chat page: it keeps the conversation, sends all of it for each answer, and shows
// what comes back. Text of the model becomes text nodes and nothing else.
"use strict";

const $ = (id) => document.getElementById(id);
const NUMBERS = [
  "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_tokens",
];
let model = null;
let messages = []; // {role, content}, without the system prompt
let forgotten = 0; // messages at the front that no longer fit into the context
let writing = null; // the AbortController of the answer that is being written

function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

// --- the server

function headers() {
  const key = $("key").value;
  return {
    "Content-Type": "application/json",
    ...(key && { Authorization: `Bearer ${key}` }),
  };
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers() });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server cannot be reached");
  }
  if (response.ok) return response;
  if (response.status === 401) {
    $("settings").open = true;
    $("key").focus();
  }
  const body = await response.json().catch(() => ({}));
  const refusal = new Error(body.error?.message ?? `the server says ${response.status}`);
  refusal.code = body.error?.code;
  throw refusal;
}

async function findModel() {
  const list = await (await ask("v1/models")).json();
  model = list.data[0].id;
  $("model").textContent = model;
  document.title = `${model} – chat`;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the answer broke off: the server has gone");
    const parts = (waiting + value).split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function requestBody(from) {
  const system = $("system").value.trim();
  const said = messages.slice(from);
  const body = {
    model,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...said],
    stream: true,
    stream_options: { include_usage: true },
    logprobs: true,
    top_logprobs: 5,
  };
  for (const name of NUMBERS) {
    const value = $(name).valueAsNumber;
    if (!Number.isNaN(value)) body[name] = value;
  }
  return JSON.stringify(body);
}

// Where the conversation is too long, the older half of its turns is left out.
async function askForAnswer(signal) {
  const users = [...messages.keys()].filter((i) => messages[i].role === "user");
  let from = forgotten;
  for (;;) {
    const options = { method: "POST", body: requestBody(from), signal };
    try {
      const response = await ask("v1/chat/completions", options);
      forgotten = from;
      return response;
    } catch (error) {
      const later = users.filter((i) => i > from);
      if (error.code !== "context_length_exceeded" || !later.length) throw error;
      from = later[(later.length - 1) >> 1];
    }
  }
}

// --- an answer on the page

// Tokens may be parts of characters, and text may be held back: a token is shown when
// its characters are complete and have come.
class Answer {
  constructor(box) {
    this.box = box;
    this.text = "";
    this.shown = 0; // characters that are on the page
    this.tokens = []; // of the characters that are not
    this.bytes = [];
  }

  add(text, tokens) {
    this.text += text;
    for (const token of tokens) {
      this.tokens.push(token);
      this.bytes.push(...token.bytes);
      const come = this.text.length - this.shown;
      // more than four bytes that are no text have come as replacement characters
      const length = decode(this.bytes)?.length ?? (this.bytes.length > 4 ? come : 0);
      if (length && length <= come) this.show(length);
    }
  }

  show(length) {
    const span = element("span", "token", this.text.substr(this.shown, length));
    this.shown += length;
    span.tokens = this.tokens;
    const worst = Math.min(...this.tokens.map((token) => token.logprob));
    span.style.setProperty("--p", Math.exp(worst).toFixed(3));
    this.box.append(span);
    this.tokens = [];
    this.bytes = [];
  }

  end() {
    if (this.shown === this.text.length) return;
    if (this.tokens.length) this.show(this.text.length - this.shown);
    else this.box.append(this.text.slice(this.shown));
  }
}

function decode(bytes) {
  try {
    const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
    return decoder.decode(new Uint8Array(bytes));
  } catch {
    return null;
  }
}

function addMessage(role, text) {
  const box = element("div", `message ${role}`);
  const inner = element("div", "text", text);
  inner.dir = "auto";
  box.append(element("h2", "", role === "user" ? "You" : "Model"), inner);
  $("chat").append(box);
  $("chat").scrollTop = $("chat").scrollHeight;
  return box;
}

function notes(times, usage, reason) {
  const seconds = (times.last - times.first) / 1000;
  const count = usage?.completion_tokens ?? times.tokens;
  const parts = [`${count} token${count === 1 ? "" : "s"}`];
  if (times.tokens > 1 && seconds > 0) {
    parts.push(`${((times.tokens - 1) / seconds).toFixed(1)} tokens/s`);
  }
  if (times.first) {
    parts.push(`first after ${((times.first - times.start) / 1000).toFixed(2)} s`);
  }
  if (reason === "length") parts.push("cut off at the most tokens");
  if (reason === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

// `takeBack` makes the conversation what it was, where there is no answer.
async function write(takeBack) {
  const before = forgotten;
  const full = element("p", "notes");
  const box = addMessage("assistant", "");
  const answer = new Answer(box.querySelector(".text"));
  const line = element("p", "notes");
  box.append(line);
  box.classList.add("writing");
  box.ariaBusy = "true"; // read out when it is complete
  const times = { start: performance.now(), first: 0, last: 0, tokens: 0 };
  let reason = "", usage = null;
  $("error").textContent = "";
  writing = new AbortController();
  setButtons();
  try {
    if (model === null) await findModel();
    const response = await askForAnswer(writing.signal);
    if (forgotten > before) {
      const first = `the first ${forgotten} messages are no longer read`;
      full.textContent = `The context is full: ${first}.`;
      box.before(full);
    }
    for await (const event of events(response)) {
      usage = event.usage ?? usage;
      for (const choice of event.choices) {
        const tokens = choice.logprobs?.content ?? [];
        const chat = $("chat");
        const near = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 60;
        answer.add(choice.delta.content ?? "", tokens);
        reason = choice.finish_reason ?? reason;
        if (tokens.length) {
          times.last = performance.now();
          times.first ||= times.last;
          times.tokens += tokens.length;
          line.textContent = notes(times);
        }
        if (near) chat.scrollTop = chat.scrollHeight;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped";
    else $("error").textContent = error.message;
  }
  writing = null;
  answer.end();
  box.classList.remove("writing");
  box.ariaBusy = "false";
  line.textContent = notes(times, usage, reason);
  if (answer.text) {
    messages.push({ role: "assistant", content: answer.text });
    box.querySelector(".text").tabIndex = 0; // for the arrow keys
  } else if ($("error").textContent) {
    full.remove();
    box.remove();
    forgotten = before;
    takeBack();
  }
  setButtons();
}

// --- what one can do

function setButtons() {
  const focused = document.activeElement;
  $("send").hidden = writing !== null;
  $("stop").hidden = writing === null;
  $("again").disabled = messages.length === 0;
  $("again").ariaDisabled = writing !== null; // what is disabled loses the focus
  $("clear").disabled = writing !== null;
  if (focused === $("send") && writing) $("stop").focus();
  if (focused === $("stop") && !writing) $("text").focus();
}

function fitText() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight + 2}px`;
}

function send() {
  const text = $("text").value;
  if (writing || !text.trim()) return;
  messages.push({ role: "user", content: text });
  const box = addMessage("user", text);
  $("text").value = "";
  fitText();
  write(() => {
    messages.pop();
    box.remove();
    // what was typed meanwhile stays
    $("text").value = [text, $("text").value].filter(Boolean).join("\n");
    fitText();
  });
}

function again() {
  if (writing || !messages.length) return;
  const said = messages.at(-1).role === "assistant" ? [messages.pop()] : [];
  const last = $("chat").lastElementChild;
  const shown = last?.classList.contains("assistant") ? [last] : [];
  shown.forEach((box) => box.remove());
  hideToken();
  write(() => {
    messages.push(...said);
    $("chat").append(...shown);
  });
}

function clear() {
  if (writing) return;
  messages = [];
  forgotten = 0;
  $("chat").replaceChildren();
  $("error").textContent = "";
  hideToken();
  setButtons();
  $("text").focus();
}

// --- the probabilities of a token

const shownText = (token) => JSON.stringify(token).slice(1, -1);

function row(entry, drawn) {
  const line = element("tr", drawn ? "drawn" : "");
  const percent = `${(Math.exp(entry.logprob) * 100).toFixed(1)} %`;
  line.append(element("td", "", shownText(entry.token)), element("td", "", percent));
  return line;
}

function showToken(span) {
  hideToken();
  span.classList.add("chosen");
  const table = element("table", "");
  for (const token of span.tokens) {
    const same = (other) => other.bytes.join() === token.bytes.join();
    const drawn = token.top_logprobs.findIndex(same);
    table.append(...token.top_logprobs.map((entry, i) => row(entry, i === drawn)));
    if (drawn < 0) table.append(row(token, true));
  }
  const tip = $("token");
  tip.replaceChildren(table);
  tip.hidden = false;
  const place = span.getBoundingClientRect();
  const left = Math.min(place.left, innerWidth - tip.offsetWidth - 8);
  const above = place.top - tip.offsetHeight - 6;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${above > 0 ? above : place.bottom + 6}px`;
}

function hideToken() {
  document.querySelector(".token.chosen")?.classList.remove("chosen");
  $("token").hidden = true;
}

function moveToken(box, key) {
  const spans = [...box.querySelectorAll(".token")];
  const now = spans.findIndex((span) => span.classList.contains("chosen"));
  const next = {
    ArrowLeft: now < 0 ? spans.length - 1 : now - 1,
    ArrowRight: now + 1, Home: 0, End: spans.length - 1,
  }[key];
  if (spans[next]) {
    spans[next].scrollIntoView({ block: "nearest" });
    showToken(spans[next]);
  }
}

// --- events

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("fields").addEventListener("submit", (event) => event.preventDefault());
$("text").addEventListener("input", fitText);
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
$("stop").addEventListener("click", () => {
  writing?.abort();
  $("text").focus();
});
$("again").addEventListener("click", again);
$("clear").addEventListener("click", clear);
$("shade").addEventListener("change", (event) => {
  $("chat").classList.toggle("shaded", event.target.checked);
});
document.addEventListener("keydown", (event) => {
  const box = document.activeElement;
  if (event.key === "Escape") {
    hideToken();
    writing?.abort();
  } else if (box.classList.contains("text") && /^(Arrow(Left|Right)|Home|End)$/.test(event.key)) {
    event.preventDefault();
    moveToken(box, event.key);
  }
});
$("chat").addEventListener("pointerover", (event) => {
  if (event.target.classList.contains("token")) showToken(event.target);
});
$("chat").addEventListener("pointerout", (event) => {
  if (event.pointerType === "mouse") hideToken(); // a finger has left, the tip stays
});
$("chat").addEventListener("focusout", hideToken);
$("chat").addEventListener("scroll", hideToken);
document.addEventListener("pointerdown", (event) => {
  if (!event.target.classList.contains("token")) hideToken();
});

$("settings").open = matchMedia("(min-width: 900px)").matches;
setButtons();
findModel().catch((error) => ($("error").textContent = error.message));
