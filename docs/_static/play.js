// The pages to play with: plain functions that compute (tests call them), and one
// function a page that draws. Nothing is fetched: the data stands in the page.
"use strict";

const play = {};

// --- small helpers

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

function drawn(name, attributes = {}, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

function data(root) {
  return JSON.parse(root.querySelector(".play-data").textContent);
}

// a labelled slider whose value can be read; returns what reads and sets it
function slider(label, min, max, step, value, shown, onchange) {
  // a label belongs to the first control in it, and an output is one: two siblings
  const id = `play-${label.replace(/\W+/g, "-")}`;
  const output = element("output", { for: id });
  const input = element("input", { type: "range", id, min, max, step, value });
  const tell = () => {
    output.textContent = shown(Number(input.value));
  };
  input.addEventListener("input", () => {
    tell();
    onchange();
  });
  tell();
  const name = element("label", { for: id }, label);
  const box = element("div", { class: "play-field" }, name, " ", output, input);
  return {
    box,
    get value() {
      return Number(input.value);
    },
    set value(x) {
      input.value = x;
      tell();
    },
  };
}

function choice(label, options, value, onchange) {
  const select = element("select", { onchange });
  for (const [name, text] of options) {
    select.append(element("option", { value: name, selected: name === value }, text));
  }
  return {
    box: element("label", { class: "play-field" }, `${label} `, select),
    get value() {
      return select.value;
    },
    set value(x) {
      select.value = x;
    },
  };
}

function fields(root, ...controls) {
  root.append(element("div", { class: "play-fields" }, ...controls.map((c) => c.box)));
}

// --- attention

// weights of one head, [T, T], from the bytes of all heads' lower triangles
play.head = function (bytes, T, heads, layer, head) {
  const size = (T * (T + 1)) / 2;
  let at = (layer * heads + head) * size;
  return Array.from({ length: T }, (_, t) =>
    Array.from({ length: T }, (_, s) => (s <= t ? bytes[at++] / 255 : 0)),
  );
};

play.attention = function (root) {
  const all = data(root);
  const sentences = all.sentences.map((s) => ({
    ...s,
    bytes: Uint8Array.from(atob(s.weights), (c) => c.charCodeAt(0)),
  }));
  let query = null;
  const names = sentences.map((s, i) => [String(i), s.tokens.join("").trim()]);
  const sentence = choice("Sentence", names, "0", () => {
    query = null;
    overview();
    draw();
  });
  const layer = slider("Layer", 0, all.layers - 1, 1, 0, String, () => draw());
  const head = slider("Head", 0, all.heads - 1, 1, 0, String, () => draw());
  fields(root, sentence, layer, head);
  const noted = element("p", { class: "play-buttons" });
  const words = element("p", { class: "play-words", "aria-live": "polite" });
  const said = element("p", { class: "play-said" });
  const table = element("div", { class: "play-scroll" });
  const map = element("canvas", {
    class: "play-map",
    role: "img",
    "aria-label": "All heads as small pictures, layers as rows; the sliders choose one",
  });
  root.append(noted, words, said, table);
  root.append(element("h3", {}, "All heads at once"));
  root.append(
    element(
      "p",
      {},
      "A row is a layer, from the first above to the last below; a column is a head." +
        " Click one.",
    ),
    map,
  );
  const current = () => sentences[Number(sentence.value)];
  const weights = (l, h) =>
    play.head(current().bytes, current().tokens.length, all.heads, l, h);

  function draw() {
    const { tokens } = current();
    const T = tokens.length;
    const w = weights(layer.value, head.value);
    if (query === null) query = T - 1;
    words.replaceChildren(
      ...tokens.map((token, s) =>
        element(
          "button",
          {
            type: "button",
            class: s === query ? "query" : s > query ? "later" : "",
            style: `--weight: ${w[query][s]}`,
            "aria-pressed": String(s === query),
            onclick: () => choose(s),
          },
          token.trim() || "␣",
        ),
      ),
    );
    const best = w[query].indexOf(Math.max(...w[query]));
    said.textContent =
      `“${tokens[query].trim()}” looks most at “${tokens[best].trim()}”:` +
      ` weight ${w[query][best].toFixed(2)}.`;
    const body = element("tbody");
    const top = element("tr", {}, element("th"));
    for (const token of tokens) {
      top.append(element("th", { scope: "col" }, element("span", {}, token.trim())));
    }
    body.append(top);
    for (let t = 0; t < T; t++) {
      const row = element("tr", {
        class: t === query ? "query" : "",
        onclick: () => choose(t),
      });
      row.append(element("th", { scope: "row" }, tokens[t].trim()));
      for (let s = 0; s < T; s++) {
        const title = `${tokens[t].trim()} → ${tokens[s].trim()}: ${w[t][s].toFixed(2)}`;
        row.append(
          s > t
            ? element("td", { class: "unseen" })
            : element("td", { style: `--weight: ${w[t][s]}`, title }),
        );
      }
      body.append(row);
    }
    const caption = `Weights of layer ${layer.value}, head ${head.value}: queries as rows, keys as columns`;
    table.replaceChildren(
      element("table", { class: "play-heat" }, element("caption", {}, caption), body),
    );
    mark();
  }

  function choose(t) {
    const focused = words.contains(document.activeElement);
    query = t;
    draw();
    if (focused) words.children[t].focus();
  }

  words.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) {
      event.preventDefault();
      choose(Math.min(Math.max(query + step, 0), current().tokens.length - 1));
    }
  });

  const cell = 34;
  let picture = null;

  function overview() {
    const T = current().tokens.length;
    map.width = all.heads * cell;
    map.height = all.layers * cell;
    const context = map.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, map.width, map.height);
    const pixel = (cell - 4) / T;
    for (let l = 0; l < all.layers; l++) {
      for (let h = 0; h < all.heads; h++) {
        const w = weights(l, h);
        for (let t = 0; t < T; t++) {
          for (let s = 0; s <= t; s++) {
            context.fillStyle = `rgb(11 99 165 / ${w[t][s]})`;
            const [x, y] = [h * cell + 2 + s * pixel, l * cell + 2 + t * pixel];
            context.fillRect(x, y, pixel, pixel);
          }
        }
      }
    }
    picture = context.getImageData(0, 0, map.width, map.height);
    noted.replaceChildren(
      "Heads to look at: ",
      ...current().noted.map((n) =>
        element(
          "button",
          {
            type: "button",
            onclick: () => {
              layer.value = n.layer;
              head.value = n.head;
              draw();
            },
          },
          `layer ${n.layer}, head ${n.head} ${n.what} (${n.share.toFixed(2)})`,
        ),
      ),
    );
  }

  function mark() {
    const context = map.getContext("2d");
    context.putImageData(picture, 0, 0);
    context.strokeStyle = "#d1495b";
    context.lineWidth = 2;
    context.strokeRect(head.value * cell + 1, layer.value * cell + 1, cell - 2, cell - 2);
  }

  map.addEventListener("click", (event) => {
    const box = map.getBoundingClientRect();
    head.value = Math.floor(((event.clientX - box.left) / box.width) * all.heads);
    layer.value = Math.floor(((event.clientY - box.top) / box.height) * all.layers);
    draw();
  });

  overview();
  const start = current().noted[0];
  layer.value = start.layer;
  head.value = start.head;
  draw();
};

// --- rope

// radians a token of each pair
play.frequencies = (headDim, theta) =>
  Array.from({ length: headDim / 2 }, (_, i) => theta ** ((-2 * i) / headDim));

// the score of a query and a key that are all ones before they are rotated, for each
// pair: cos of the angle between them
play.agreement = (frequencies, distance) =>
  frequencies.map((w) => Math.cos(distance * w));

play.rope = function (root) {
  const thetas = [100, 1e3, 1e4, 1e5, 1e6];
  const reach = 200;
  let draw = () => {};
  const m = slider("Query's position m", 0, reach, 1, 12, String, () => draw());
  const n = slider("Key's position n", 0, reach, 1, 9, String, () => draw());
  const theta = slider("Theta", 0, 4, 1, 2, (i) => thetas[i].toLocaleString("en"), () =>
    draw(),
  );
  const pairs = slider("Width of the head h", 8, 32, 8, 16, String, () => draw());
  fields(root, m, n, theta, pairs);
  const move = (step) => () => {
    const bounded = Math.max(-Math.min(m.value, n.value), step);
    const inside = Math.min(bounded, reach - Math.max(m.value, n.value));
    m.value += inside;
    n.value += inside;
    draw();
  };
  root.append(
    element(
      "p",
      { class: "play-buttons" },
      "Both together: ",
      element("button", { type: "button", onclick: move(-10) }, "10 back"),
      element("button", { type: "button", onclick: move(-1) }, "1 back"),
      element("button", { type: "button", onclick: move(1) }, "1 on"),
      element("button", { type: "button", onclick: move(10) }, "10 on"),
    ),
  );
  const said = element("p", { class: "play-said", "aria-live": "polite" });
  const dials = element("div", { class: "play-dials" });
  const plot = element("div", { class: "play-plot" });
  root.append(said, dials, element("h3", {}, "The score over the distance"), plot);

  function hand(angle, className, length) {
    const [x, y] = [length * Math.cos(angle), -length * Math.sin(angle)];
    return drawn("line", { x1: 0, y1: 0, x2: x, y2: y, class: className });
  }

  function dial(w, i) {
    const svg = drawn("svg", { viewBox: "-1.15 -1.15 2.3 2.3", role: "img" });
    svg.setAttribute("aria-label", `pair ${i}`);
    svg.append(drawn("circle", { r: 1, class: "face" }));
    const [from, to] = [n.value * w, m.value * w];
    const turn = to - from;
    if (Math.abs(turn) < 2 * Math.PI && turn !== 0) {
      const [x0, y0] = [0.5 * Math.cos(from), -0.5 * Math.sin(from)];
      const [x1, y1] = [0.5 * Math.cos(to), -0.5 * Math.sin(to)];
      const large = Math.abs(turn) > Math.PI ? 1 : 0;
      const path = `M ${x0} ${y0} A 0.5 0.5 0 ${large} ${turn > 0 ? 0 : 1} ${x1} ${y1}`;
      svg.append(drawn("path", { d: path, class: "turn" }));
    } else if (turn !== 0) {
      svg.append(drawn("circle", { r: 0.5, class: "turn" }));
    }
    svg.append(hand(from, "key", 0.75), hand(to, "query", 1));
    const wave = (2 * Math.PI) / w;
    const length = wave < 100 ? wave.toFixed(1) : Math.round(wave).toLocaleString("en");
    return element(
      "figure",
      {},
      svg,
      element("figcaption", {}, `pair ${i}`, element("br"), `once in ${length} tokens`),
    );
  }

  draw = () => {
    const w = play.frequencies(pairs.value, thetas[theta.value]);
    dials.replaceChildren(...w.map(dial));
    const distance = m.value - n.value;
    const score = (d) => play.agreement(w, d).reduce((a, b) => a + b) / w.length;
    said.textContent =
      `m − n = ${distance}. The score of two vectors of ones, over its largest value:` +
      ` ${score(distance).toFixed(3)}. Move both: the hands turn, the angle between` +
      " them and the score stay.";
    const svg = drawn("svg", { viewBox: "-44 -8 660 216", role: "img" });
    svg.setAttribute("aria-label", "score over distance, a falling, wavering line");
    const [x, y] = [(d) => (d + reach) * 1.5, (v) => (1 - v) * 92];
    for (const v of [-1, -0.5, 0, 0.5, 1]) {
      svg.append(drawn("line", { x1: 0, x2: 600, y1: y(v), y2: y(v), class: "grid" }));
      svg.append(drawn("text", { x: -6, y: y(v) + 4, class: "end" }, String(v)));
    }
    for (const d of [-200, -100, 0, 100, 200]) {
      svg.append(drawn("text", { x: x(d), y: 203, class: "middle" }, String(d)));
    }
    const points = [];
    for (let d = -reach; d <= reach; d++) points.push(`${x(d)},${y(score(d))}`);
    svg.append(drawn("polyline", { points: points.join(" "), class: "line" }));
    const here = { cx: x(distance), cy: y(score(distance)), r: 6, class: "here" };
    svg.append(drawn("circle", here));
    plot.replaceChildren(svg);
  };
  draw();
};

// --- sampling

// probabilities and which tokens stay, by the package's order: temperature, top-k,
// top-p, min-p
play.cut = function (logits, { temperature, topK, topP, minP }) {
  const softmax = (xs) => {
    const largest = Math.max(...xs);
    const e = xs.map((x) => Math.exp(x - largest));
    const sum = e.reduce((a, b) => a + b);
    return e.map((x) => x / sum);
  };
  if (temperature === 0) {
    const first = logits.indexOf(Math.max(...logits));
    return logits.map((_, i) => (i === first ? 1 : 0));
  }
  let left = logits.map((x) => x / temperature);
  if (topK !== null) {
    const kth = [...left].sort((a, b) => b - a)[Math.min(topK, left.length) - 1];
    left = left.map((x) => (x < kth ? -Infinity : x));
  }
  if (topP !== null) {
    const p = softmax(left);
    const order = [...left.keys()].sort((a, b) => left[a] - left[b]);
    let sum = 0;
    order.slice(0, -1).forEach((i) => {
      sum += p[i];
      if (sum <= 1 - topP) left[i] = -Infinity;
    });
  }
  if (minP !== null) {
    const p = softmax(left);
    const least = minP * Math.max(...p);
    left = left.map((x, i) => (p[i] < least ? -Infinity : x));
  }
  return softmax(left);
};

play.words = {
  "The sky is …": [
    ["blue", 4.0], ["clear", 3.1], ["grey", 2.7], ["dark", 2.4], ["falling", 1.2],
    ["full", 0.9], ["the", 0.1], ["soup", -1.6], ["seventeen", -3.0],
  ],
  "She opened the door and …": [
    ["saw", 2.1], ["stepped", 2.0], ["looked", 1.9], ["the", 1.8], ["walked", 1.7],
    ["found", 1.5], ["sang", 0.4], ["is", -1.2], ["purple", -2.8],
  ],
  "2 + 2 = …": [
    ["4", 7.5], ["5", 2.6], ["four", 2.2], ["22", 1.6], ["3", 1.4], ["?", 0.6],
    ["the", -0.5], ["fish", -2.5], ["blue", -3.0],
  ],
};

play.sampling = function (root) {
  let counts = null;
  let draw = () => {};
  const change = () => {
    counts = null;
    draw();
  };
  const names = Object.keys(play.words).map((name) => [name, name]);
  const text = choice("Text", names, names[0][0], change);
  const temperature = slider("Temperature", 0, 2, 0.05, 1, (x) => x.toFixed(2), change);
  const off = (last) => (x) => (x === last ? "off" : String(x));
  const topK = slider("Top-k", 1, 9, 1, 9, off(9), change);
  const topP = slider("Top-p", 0.05, 1, 0.05, 1, (x) => (x === 1 ? "off" : x.toFixed(2)), change);
  const minP = slider("Min-p", 0, 1, 0.01, 0, (x) => (x === 0 ? "off" : x.toFixed(2)), change);
  fields(root, text, temperature, topK, topP, minP);
  const bars = element("div", { class: "play-bars" });
  const said = element("p", { class: "play-said", "aria-live": "polite" });
  const params = () => ({
    temperature: temperature.value,
    topK: topK.value === 9 ? null : topK.value,
    topP: topP.value === 1 ? null : topP.value,
    minP: minP.value === 0 ? null : minP.value,
  });
  const random = () => {
    const rows = play.words[text.value];
    const p = play.cut(rows.map((row) => row[1]), params());
    counts = counts ?? p.map(() => 0);
    for (let i = 0; i < 100; i++) {
      let x = Math.random();
      const drawnOne = p.findIndex((share) => (x -= share) < 0);
      counts[drawnOne < 0 ? p.lastIndexOf(Math.max(...p)) : drawnOne]++;
    }
    draw();
  };
  root.append(
    bars,
    said,
    element(
      "p",
      { class: "play-buttons" },
      element("button", { type: "button", onclick: random }, "Draw 100 words"),
      element("button", { type: "button", onclick: change }, "Forget them"),
    ),
  );
  draw = () => {
    const rows = play.words[text.value];
    const logits = rows.map((row) => row[1]);
    const none = { temperature: 1, topK: null, topP: null, minP: null };
    const before = play.cut(logits, none);
    const after = play.cut(logits, params());
    const total = counts ? counts.reduce((a, b) => a + b) : 0;
    bars.replaceChildren(
      ...rows.map(([word, logit], i) =>
        element(
          "div",
          { class: after[i] === 0 ? "bar cut" : "bar" },
          element("span", { class: "word" }, word),
          element(
            "span",
            { class: "track", title: `logit ${logit.toFixed(1)}` },
            element("span", { class: "before", style: `width: ${100 * before[i]}%` }),
            element("span", { class: "after", style: `width: ${100 * after[i]}%` }),
            counts
              ? element("span", {
                  class: "drawn",
                  style: `left: ${(100 * counts[i]) / total}%`,
                })
              : "",
          ),
          element("span", { class: "share" }, after[i] ? after[i].toFixed(3) : "cut"),
        ),
      ),
    );
    const kept = after.filter((x) => x > 0).length;
    const entropy = -after.reduce((sum, x) => sum + (x ? x * Math.log2(x) : 0), 0);
    said.textContent =
      `${kept} of ${rows.length} words can be drawn; ${entropy.toFixed(2)} bits of` +
      " surprise a word." +
      (counts ? ` Red marks: the shares of ${total} drawn words.` : "");
  };
  draw();
};

// --- memory: the formulas of qwen_analog.memory, which a test sets beside these

const STORED = { fp32: 4, bf16: 4, "bf16-pure": 2 };
const COMPUTED = { fp32: 4, bf16: 2, "bf16-pure": 2 };
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);

play.parameterCounts = function (c) {
  const [q, kv] = [
    c.num_attention_heads * c.head_dim,
    c.num_key_value_heads * c.head_dim,
  ];
  const [V, D, L] = [c.vocab_size, c.hidden_size, c.num_hidden_layers];
  const small = (c.attention_bias ? q + 2 * kv : 0) + (c.qk_norm ? 2 * c.head_dim : 0);
  return {
    embedding: V * D,
    attention: L * (2 * D * q + 2 * D * kv + small),
    mlp: L * 3 * D * c.intermediate_size,
    norms: (2 * L + 1) * D,
    lm_head: c.tie_word_embeddings ? 0 : V * D,
  };
};

play.savedActivations = function (c, s, precision, mode) {
  const N = s.batch_size * s.sequence_length;
  const [D, F] = [c.hidden_size, c.intermediate_size];
  const [H, K, h] = [c.num_attention_heads, c.num_key_value_heads, c.head_dim];
  const [stream, size] = [STORED[precision], COMPUTED[precision]];
  const input = { "block input": N * D * stream };
  if (mode === "full") return input;
  const products = {
    v: N * K * h * size,
    attention: N * H * h * size,
    "log-sum-exp": N * H * 4,
    "gate, up": 2 * N * F * size,
  };
  const qk = N * (H + K) * h * size;
  if (mode === "selective") {
    const rest = { "q, k before rotation": qk, "output projection": N * D * size };
    return { ...input, ...products, ...rest };
  }
  const [qkvCasts, mlpCasts] = precision === "bf16" ? [3, 2] : [1, 1];
  const kept = {
    "q, k": qk,
    ...products,
    "norms: inputs": 2 * N * D * 4,
    "norms: 1 / rms": 2 * N * 4,
    "norms: normalised": 2 * N * D * stream,
    "inputs of q, k, v": qkvCasts * N * D * size,
    "inputs of gate, up": mlpCasts * N * D * size,
    "silu, product": 2 * N * F * size,
  };
  if (c.qk_norm) {
    const name = size === 4 ? "q, k before rotation" : "norms of q, k: inputs";
    kept[name] = N * (H + K) * h * 4;
    kept["norms of q, k: 1 / rms"] = N * (H + K) * 4;
    kept["norms of q, k: normalised"] = qk;
  }
  if (s.document_masks) {
    kept["attention mask"] = s.batch_size * s.sequence_length ** 2 * size;
  }
  return kept;
};

// what the number of weights decides
function weightBytes(c, s) {
  const parts = play.parameterCounts(c);
  const [stored, computed] = [STORED[s.precision], COMPUTED[s.precision]];
  const [total, L, D] = [sum(Object.values(parts)), c.num_hidden_layers, c.hidden_size];
  const block = (parts.attention + parts.mlp) / L + 2 * D;
  const root = total - L * block;
  const embedding = c.vocab_size * D;
  const w = { parameters: Math.floor((total * stored) / s.shards) };
  w.gradients = w.parameters;
  w.updating = 0;
  if (s.optimizer === "muon") {
    const heads = c.num_attention_heads + c.num_key_value_heads;
    const matrices = L * (2 * D * c.head_dim * heads + 3 * D * c.intermediate_size);
    w.optimizer = Math.floor(((2 * total - matrices) * stored) / s.shards);
  } else if (s.optimizer === "adamw") {
    w.optimizer = Math.floor((2 * total * stored) / s.shards);
  } else {
    const widest = Math.max(c.vocab_size, c.intermediate_size) * D;
    const piece = Math.min(s.piece_size, Math.floor(widest / s.shards));
    w.optimizer = Math.floor((4 * total) / s.shards);
    w.updating = (stored === 2 ? 31 : 23) * piece;
  }
  w.copies = s.autocast ? computed * (block - 2 * D) : 0;
  const made = s.sharded ? computed : stored;
  w.head = embedding * made;
  w.waiting = c.tie_word_embeddings || s.sharded ? w.head : 0;
  const last = (block + (s.sharded ? root : embedding)) * stored;
  w.earlier = s.accumulated ? w.gradients : 0;
  w.beforeLast = w.gradients - (s.accumulated ? 0 : Math.floor(last / s.shards));
  w.rootGathered = s.sharded ? root * computed : 0;
  w.blocksGathered = s.sharded ? 2 * block * computed : 0;
  w.blockGradient = s.sharded ? block * made : 0;
  w.blockReduced = s.sharded ? 4 * block : 0;
  w.rootReduced = s.sharded ? 4 * root : 0;
  return w;
}

// what the number of tokens decides
function activationBytes(c, s, copies) {
  const mode = s.activation_checkpointing;
  const kept = play.savedActivations(c, s, s.inside, mode);
  const everything = play.savedActivations(c, s, s.inside, "none");
  const [N, D, F] = [s.batch_size * s.sequence_length, c.hidden_size, c.intermediate_size];
  const stored = STORED[s.inside];
  const a = { stream: N * D * stored };
  a.block = sum(Object.values(kept)) + (mode === "none" ? copies : 0);
  a.inUse = copies + sum(Object.values(everything));
  if (mode !== "none") {
    const only = Object.keys(kept).filter((name) => !(name in everything));
    a.inUse += sum(only.map((name) => kept[name])) - (stored === 4 ? N * D * 4 : 0);
  }
  a.masks = s.document_masks ? s.batch_size * s.sequence_length ** 2 : 0;
  a.around = N * D * 4 + a.stream + 2 * N * c.head_dim * stored + a.masks;
  a.chunk = 2 * Math.min(s.chunk_size, N) * c.vocab_size * 4;
  const size = COMPUTED[s.precision];
  const tokens = N * F * size;
  const fresh = D * F * (s.sharded ? size : STORED[s.precision]);
  const rounded = s.autocast ? D * F * size : 0;
  const added = s.accumulated && !s.sharded ? 0 : fresh;
  a.working =
    a.stream + Math.max(tokens + (rounded || fresh), rounded + fresh, 2 * tokens + added);
  return a;
}

function trainingMoments(c, s) {
  const w = weightBytes(c, s);
  const a = activationBytes(c, s, w.copies);
  const head = c.vocab_size * c.hidden_size;
  const blocks = c.num_hidden_layers * a.block;
  const gathered = w.rootGathered + w.blocksGathered;
  const moments = {
    "the optimizer's step": { gradients: w.gradients, activations: w.updating },
    "the loss": {
      gradients: w.earlier + head * 4,
      activations: blocks + a.around + a.stream,
      logits: a.stream + a.chunk + (s.autocast ? head * COMPUTED[s.precision] : 0),
      communication: w.rootGathered,
    },
    "the loss's backward pass": {
      gradients: w.earlier + w.head,
      activations: blocks + a.around,
      logits: 2 * a.stream,
      communication: w.rootGathered,
    },
    "the last block's backward pass": {
      gradients: w.earlier + (s.accumulated ? w.waiting : w.head),
      activations:
        (c.num_hidden_layers - 1) * a.block + a.inUse + a.around + a.working,
      communication: gathered,
    },
    "the first block's backward pass": {
      gradients: w.beforeLast + w.waiting,
      activations: a.inUse + a.working + a.masks,
      communication: gathered + w.blockReduced,
    },
    "the first block's last gradient": {
      gradients: w.beforeLast + w.waiting + w.blockGradient,
      activations: a.stream + a.masks,
      communication: gathered + w.blockReduced,
    },
    "the embedding's backward pass": {
      gradients: w.gradients + w.waiting + (s.accumulated || s.sharded ? w.head : 0),
      activations: a.stream,
      communication: w.rootGathered + w.rootReduced,
    },
  };
  const fixed = { parameters: w.parameters, optimizer: w.optimizer };
  return Object.entries(moments).map(([moment, m]) => ({ moment, ...fixed, ...m }));
}

function inferenceMoments(c, s) {
  const size = COMPUTED[s.precision];
  const N = s.batch_size * s.sequence_length;
  const fixed = {
    parameters: sum(Object.values(play.parameterCounts(c))) * size,
    kv_cache: 2 * c.num_hidden_layers * N * c.num_key_value_heads * c.head_dim * size,
  };
  return [
    {
      moment: "the prompt's pass through an MLP",
      ...fixed,
      activations: N * 3 * (c.hidden_size + c.intermediate_size) * size,
    },
    {
      moment: "the draw of a token",
      ...fixed,
      logits: s.batch_size * c.vocab_size * (size + 8),
    },
  ];
}

play.CATEGORIES = [
  "parameters", "gradients", "optimizer", "activations", "logits", "communication",
  "kv_cache",
];

// bytes on one GPU by category at the fullest moment, as `estimate_memory` gives them
play.estimateMemory = function (c, settings) {
  const s = { ...settings };
  s.sharded = s.strategy !== "ddp" && s.shards * s.replicas > 1;
  s.accumulated = s.micro_batches > 1 || (s.replicas > 1 && !s.sharded);
  s.autocast = s.precision === "bf16" && !s.sharded;
  s.inside = s.precision === "bf16" && s.sharded ? "bf16-pure" : s.precision;
  const moments = s.optimizer === null ? inferenceMoments(c, s) : trainingMoments(c, s);
  const total = (m) => sum(play.CATEGORIES.map((name) => m[name] ?? 0));
  const fullest = moments.reduce((a, b) => (total(b) > total(a) ? b : a));
  return { ...fullest, total: total(fullest) };
};

play.memory = function (root) {
  const known = data(root);
  let draw = () => {};
  const same = (names) => names.map((name) => [String(name), String(name)]);
  const model = choice("Model", same(Object.keys(known.presets)), "analog-3b", () => draw());
  const optimizers = known.optimizer.map((name) =>
    name === null ? ["", "none: inference"] : [name, name],
  );
  const optimizer = choice("Optimizer", optimizers, "adamw", () => draw());
  const precision = choice("Precision", same(known.precision), "bf16", () => draw());
  const checkpointing = choice(
    "Activation checkpointing",
    same(known.activation_checkpointing),
    "none",
    () => draw(),
  );
  const power = (x) => (2 ** x).toLocaleString("en");
  const batch = slider("Sequences at a time", 0, 7, 1, 0, power, () => draw());
  const length = slider("Tokens in a sequence", 7, 15, 1, 12, power, () => draw());
  const steps = slider("Micro-batches of a step", 0, 6, 1, 3, power, () => draw());
  const strategy = choice("Strategy", same(known.strategy), "ddp", () => draw());
  const shards = slider("GPUs that share a model", 0, 8, 1, 0, power, () => draw());
  const replicas = slider("Such groups", 0, 8, 1, 0, power, () => draw());
  fields(
    root, model, optimizer, precision, checkpointing, batch, length, steps, strategy,
    shards, replicas,
  );
  const masks = element("input", { type: "checkbox", checked: true, onchange: () => draw() });
  root.append(
    element("p", {}, element("label", {}, masks, " Tokens see only their own document")),
  );
  const said = element("p", { class: "play-said", "aria-live": "polite" });
  const bar = element("div", { class: "play-stack", "aria-hidden": "true" });
  const table = element("table", { class: "play-table" });
  const fits = element("p", { class: "play-fits" });
  root.append(said, bar, table, fits);
  const gpus = { "RTX 4090": 24, "A100 40 GB": 40, "A100, H100": 80, H200: 141 };

  draw = () => {
    const config = known.presets[model.value];
    if (strategy.value === "ddp") shards.value = 0;
    const settings = {
      precision: precision.value,
      optimizer: optimizer.value || null,
      activation_checkpointing: checkpointing.value,
      batch_size: 2 ** batch.value,
      sequence_length: 2 ** length.value,
      micro_batches: 2 ** steps.value,
      strategy: strategy.value,
      shards: 2 ** shards.value,
      replicas: 2 ** replicas.value,
      document_masks: masks.checked,
      chunk_size: known.chunk_size,
      piece_size: known.piece_size,
    };
    const m = play.estimateMemory(config, settings);
    const billions = sum(Object.values(play.parameterCounts(config))) / 1e9;
    const gb = (bytes) => (bytes / 1e9).toFixed(2);
    said.textContent =
      `${billions.toFixed(2)} billion parameters: ${gb(m.total)} GB on each GPU, at` +
      ` ${m.moment}.`;
    const there = play.CATEGORIES.filter((name) => m[name]);
    bar.replaceChildren(
      ...there.map((name) =>
        element("span", { class: name, style: `width: ${(100 * m[name]) / m.total}%` }),
      ),
    );
    table.replaceChildren(
      element(
        "tbody",
        {},
        ...there.map((name) =>
          element(
            "tr",
            {},
            element(
              "th",
              { scope: "row" },
              element("span", { class: `key ${name}` }),
              name.replace("kv_cache", "KV cache"),
            ),
            element("td", {}, `${gb(m[name])} GB`),
            element("td", {}, `${((100 * m[name]) / m.total).toFixed(0)}%`),
          ),
        ),
      ),
    );
    // 5% and 0.8 GB: the allocator's gaps and the CUDA context
    const needed = (m.total * 1.05) / 1e9 + 0.8;
    fits.replaceChildren(
      `With 5% for gaps and 0.8 GB for the driver, ${needed.toFixed(1)} GB: `,
      ...Object.entries(gpus).map(([name, size]) =>
        element(
          "span",
          { class: needed <= size ? "fits" : "full" },
          `${name} (${size} GB) ${needed <= size ? "✓" : "✗"}`,
        ),
      ),
    );
  };
  draw();
};

// --- timeline

// what a run was at a step: its loss, its learning rate, and the text of the last
// checkpoint up to then
play.moment = function ({ loss, learning_rate, samples }, step) {
  const written = Math.max(...Object.keys(samples).map(Number).filter((s) => s <= step));
  return {
    // before the first step there is neither
    loss: step ? loss[step - 1] : null,
    rate: step ? learning_rate[step - 1] : null,
    written,
    text: samples[written],
  };
};

play.timeline = function (root) {
  const run = data(root);
  const steps = run.loss.length;
  let draw = () => {};
  const step = slider("Step", 0, steps, 1, 0, String, () => draw());
  fields(root, step);
  const move = (to) => () => {
    step.value = to(step.value);
    draw();
  };
  const marks = Object.keys(run.samples).map(Number);
  const before = (x) => Math.max(0, ...marks.filter((s) => s < x));
  const after = (x) => Math.min(steps, ...marks.filter((s) => s > x));
  root.append(
    element(
      "p",
      { class: "play-buttons" },
      element("button", { type: "button", onclick: move(before) }, "Checkpoint before"),
      element("button", { type: "button", onclick: move(after) }, "Next checkpoint"),
    ),
  );
  const said = element("p", { class: "play-said", "aria-live": "polite" });
  const written = element("blockquote", { class: "play-written" });
  const plot = element("div", { class: "play-plot" });
  root.append(said, written, plot);

  const top = Math.log(run.vocabulary);
  const bottom = Math.floor(Math.min(...run.loss));
  const highest = Math.max(...run.learning_rate);
  const x = (s) => (600 * s) / steps;
  const y = (loss) => 160 - (150 * (loss - bottom)) / (top - bottom);
  const z = (rate) => 280 - (80 * rate) / highest;
  const line = (values, at) => values.map((v, i) => `${x(i + 1)},${at(v)}`).join(" ");

  draw = () => {
    const now = play.moment(run, step.value);
    said.textContent = step.value
      ? `Step ${step.value}: loss ${now.loss.toFixed(2)} nats a token, learning rate` +
        ` ${now.rate.toFixed(5)}. Written at step ${now.written}:`
      : `Before the first step: a loss near ln ${run.vocabulary} = ${top.toFixed(2)}.` +
        " Written by the first weights:";
    // the first weights write bytes that are no letters
    written.textContent = now.text.replace(/[\u0000-\u001f\ufffd]/g, "·");
    const svg = drawn("svg", { viewBox: "-52 -8 664 314", role: "img" });
    svg.setAttribute("aria-label", "the loss falls; the learning rate rises, then falls");
    for (let v = bottom; v <= top; v++) {
      svg.append(drawn("line", { x1: 0, x2: 600, y1: y(v), y2: y(v), class: "grid" }));
      svg.append(drawn("text", { x: -6, y: y(v) + 4, class: "end" }, String(v)));
    }
    for (const v of [0, highest]) {
      svg.append(drawn("line", { x1: 0, x2: 600, y1: z(v), y2: z(v), class: "grid" }));
      svg.append(drawn("text", { x: -6, y: z(v) + 4, class: "end" }, String(v)));
    }
    for (let s = 0; s <= steps; s += 20) {
      svg.append(drawn("text", { x: x(s), y: 298, class: "middle" }, String(s)));
    }
    svg.append(drawn("text", { x: 600, y: 6, class: "end" }, "loss; dots: held out"));
    svg.append(drawn("text", { x: 600, y: 194, class: "end" }, "learning rate"));
    svg.append(drawn("polyline", { points: line(run.loss, y), class: "line" }));
    svg.append(drawn("polyline", { points: line(run.learning_rate, z), class: "line" }));
    for (const [s, loss] of Object.entries(run.held_out)) {
      svg.append(drawn("circle", { cx: x(s), cy: y(loss), r: 4, class: "held-out" }));
    }
    const here = { x1: x(step.value), x2: x(step.value), y1: 0, y2: 280 };
    svg.append(drawn("line", { ...here, class: "now" }));
    if (step.value) {
      svg.append(drawn("circle", { cx: x(step.value), cy: y(now.loss), r: 6, class: "here" }));
    }
    plot.replaceChildren(svg);
  };
  draw();
};

// --- start

window.play = play;
for (const root of document.querySelectorAll("[data-play]")) {
  play[root.dataset.play](root);
}
