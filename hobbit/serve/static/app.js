import { events, figures, line, state } from "./figures.js";

const at = (id) => document.getElementById(id);
const SECONDS = 60;
const RETRY_MS = 2000;
const percent = (v) => `${(100 * v).toFixed(0)} %`;

const CHARTS = [
  ["rate", "Tokens a second", (v) => v.toFixed(v < 10 ? 2 : 1), 0],
  ["hit", "Experts found in memory", percent, 1],
  ["device", "Found on the device", percent, 1],
  ["high", "In high precision", percent, 1],
  ["low", "In low precision", percent, 1],
  ["read", "MiB read a token", (v) => v.toFixed(1), 0],
  ["stall", "Waiting for the disk", percent, 1],
  ["memory", "Memory of the cap", percent, 1],
];

let messages = [];
let running = null;

function headers() {
  const key = at("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function fetched(path, options = {}) {
  const response = await fetch(path, { headers: headers(), ...options });
  if (response.ok) return response;
  let message = `the server says ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // No JSON: the status has to do.
  }
  throw Object.assign(new Error(message), { status: response.status });
}

// Calls take with the data of each event, as they come.
async function read(response, take) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const [found, rest] = events(text + decoder.decode(value, { stream: true }));
    text = rest;
    found.filter((data) => data !== "[DONE]").forEach((data) => take(JSON.parse(data)));
  }
}

// Chat

function entry(who, name) {
  const item = document.createElement("li");
  item.className = who;
  const label = document.createElement("span");
  label.className = "who";
  label.textContent = name;
  item.append(label);
  const [thought, text] = ["thought", "text"].map((kind) => {
    const span = document.createElement("span");
    span.className = kind;
    item.append(span);
    return written(span);
  });
  at("log").append(item);
  return { item, thought, text };
}

// Returns what appends text to an element, at most once a frame: a fast model has many tokens in one.
function written(element) {
  const node = element.appendChild(document.createTextNode(""));
  let more = "";
  return (text) => {
    if (!more && text) requestAnimationFrame(() => show());
    more += text;
  };
  function show() {
    const log = at("log");
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    node.appendData(more);
    more = "";
    if (atEnd) log.scrollTop = log.scrollHeight;
  }
}

function request() {
  const system = at("system").value;
  const body = {
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    stream: true,
    stream_options: { include_usage: true },
  };
  if (at("temperature").value) body.temperature = Number(at("temperature").value);
  if (at("max-tokens").value) body.max_tokens = Number(at("max-tokens").value);
  return JSON.stringify(body);
}

function cost(chunk) {
  const t = chunk.timings;
  const h = chunk.hobbit;
  const line = document.createElement("span");
  line.className = "cost";
  line.textContent =
    `${t.predicted_n} tokens, ${t.predicted_per_second.toFixed(1)} tok/s, ` +
    `first after ${(t.prompt_ms / 1000).toFixed(1)} s, ${h.quality}, hit ${percent(h.hit)}, ` +
    `${h.mib_per_token.toFixed(1)} MiB/token`;
  return line;
}

async function ask(text) {
  messages.push({ role: "user", content: text });
  entry("user", "You").text(text);
  const answer = entry("assistant", "Model");
  let said = "";
  running = new AbortController();
  busy(true);
  at("log").scrollTop = at("log").scrollHeight;
  try {
    const options = { method: "POST", body: request(), signal: running.signal };
    await read(await fetched("v1/chat/completions", options), (chunk) => {
      if (chunk.error) throw new Error(chunk.error.message);
      const delta = chunk.choices[0]?.delta ?? {};
      said += delta.content ?? "";
      answer.text(delta.content ?? "");
      answer.thought(delta.reasoning_content ?? "");
      if (chunk.timings) answer.item.append(cost(chunk));
    });
  } catch (error) {
    at("notice").textContent = error.name === "AbortError" ? "stopped" : error.message;
  }
  if (said) messages.push({ role: "assistant", content: said });
  else {
    messages.pop();
    answer.item.remove();
  }
  running = null;
  busy(false);
  at("prompt").focus();
}

function busy(is) {
  at("send").disabled = is;
  at("clear").disabled = is;
  at("stop").disabled = !is;
  if (is) at("notice").textContent = "";
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("prompt").value.trim();
  if (!text || running) return;
  at("prompt").value = "";
  ask(text);
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("form").requestSubmit();
  }
});
at("stop").addEventListener("click", () => running?.abort());
at("clear").addEventListener("click", () => {
  messages = [];
  at("log").replaceChildren();
  at("notice").textContent = "";
});

// Charts

const NS = "http://www.w3.org/2000/svg";
const charts = CHARTS.map(([name, title, words, most]) => {
  const figure = document.createElement("figure");
  figure.dataset.chart = name;
  figure.hidden = name === "device"; // until there is one
  const caption = document.createElement("figcaption");
  const value = document.createElement("output");
  value.textContent = "-";
  caption.append(title, value);
  const svg = document.createElementNS(NS, "svg");
  svg.setAttribute("viewBox", "0 0 100 30");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${title}, last ${SECONDS} seconds`);
  const path = document.createElementNS(NS, "polyline");
  svg.append(path);
  figure.append(caption, svg);
  at("charts").append(figure);
  return { name, figure, words, most, value, path, values: Array(SECONDS).fill(null) };
});

let before = null;
let planned = false;

// There is a plan once the model was loaded.
async function plan() {
  planned = true;
  try {
    at("plan").textContent = (await (await fetched("hobbit/plan")).json()).words;
  } catch {
    planned = false;
  }
}

function show(now) {
  at("model").textContent = `${now.model}, ${now.mode ?? "not loaded yet"}, ${now.quality}`;
  at("state").textContent = state(now);
  const found = figures(before ?? now, now);
  before = now;
  if (!planned && now.mode) plan();
  for (const chart of charts) {
    const value = found[chart.name];
    chart.values = [...chart.values.slice(1), value];
    chart.path.setAttribute("points", line(chart.values, chart.most, SECONDS));
    if (value !== null) chart.value.textContent = chart.words(value);
    if (chart.name === "device") chart.figure.hidden = !now.device;
  }
}

async function follow() {
  for (;;) {
    try {
      const feed = await fetched("hobbit/events");
      await read(feed, show);
      at("state").textContent = "the server has gone";
    } catch (error) {
      at("state").textContent = error.status === 401 ? "give the API key, under Settings" : "no connection to the server";
    }
    before = null;
    planned = false;
    await new Promise((again) => setTimeout(again, RETRY_MS));
  }
}

follow();
