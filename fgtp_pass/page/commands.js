"use strict";

/* The command that serves a layout: the rules of fgtp_pass/cost/commands.py. */

/** A word as a POSIX shell takes it. */
function quoted(word) {
  if (/^[\w@%+=:,./-]+$/.test(word)) return word;
  return `'${word.replaceAll("'", `'"'"'`)}'`;
}

function modelPath() {
  const { name } = DATA.model;
  if (!name.endsWith(".json")) return name;
  return name.includes("/") ? name.slice(0, name.lastIndexOf("/")) || "/" : ".";
}

/** The text of the command, and notes on what it leaves out. */
function commandOf(state, { layout, sequences }) {
  const ascend = deviceOf(state).family === "ascend";
  const { ranks, cut, stages, experts } = layout;
  const words = ["vllm", "serve", modelPath()];
  const apart = DATA.model.has_experts && !experts && ranks > 1;
  const sizes = [
    ["--tensor-parallel-size", cut],
    ["--pipeline-parallel-size", stages],
    ["--data-parallel-size", apart ? 1 : ranks],
  ];
  for (const [flag, size] of sizes) if (size > 1) words.push(flag, String(size));
  const notes = apart
    ? [`Run ${ranks} of these, on devices of their own, behind a load balancer.`]
    : overNodes(state, layout, words);
  if (experts) words.push("--enable-expert-parallel");
  words.push("--max-model-len", String(state.input + state.output));
  words.push("--max-num-seqs", String(Math.ceil(sequences / ranks)));
  if (state.kv !== "auto" && state.kv !== DATA.model.kv_dtype) words.push("--kv-cache-dtype", state.kv);
  const on = [...DATA.components]
    .sort((a, b) => a.order - b.order)
    .filter(({ name }) => (layout.sizes[name] || 1) > 1);
  const beyond = on.filter(({ name }) => ascend && !DATA.ascend.includes(name));
  const config = on
    .filter((one) => !beyond.includes(one))
    .map(({ name, key }) => `"${key}": ${layout.sizes[name]}`);
  if (beyond.length) {
    notes.push(`vLLM-Ascend has no size for ${beyond.map(({ name }) => name).join(" and ")}.`);
  }
  if (!ascend && DATA.model.latent && on.some(({ name }) => name === "qkv")) {
    notes.push("qkv: vLLM takes kv_b_proj apart, so that it stays whole and frees nothing.");
  }
  if (state.mtp) {
    const drafts = `{"method": "mtp", "num_speculative_tokens": ${DATA.model.draft_layers}}`;
    words.push("--speculative-config", drafts);
  }
  if (ascend && config.length && cut > 1) {
    return { text: "", notes: ["vLLM-Ascend takes fine-grained sizes with --tensor-parallel-size 1 only."] };
  }
  const flag = DATA.schemes[state.weights].quantization;
  if (ascend && state.weights !== "none") words.push("--quantization", "ascend");
  if (!ascend && flag) words.push("--quantization", flag);
  if (config.length) {
    if (!ascend) words.push("--compilation-config", '{"passes": ["fgtp"]}');
    words.push("--additional-config", `{"finegrained_tp_config": {${config.join(", ")}}}`);
  }
  return { text: words.map(quoted).join(" "), notes };
}

function overNodes(state, layout, words) {
  const devices = layout.cut * layout.stages * layout.ranks;
  if (devices <= state.node) return [];
  const local = Math.floor(state.node / (layout.cut * layout.stages));
  if (!local) {
    const nodes = Math.ceil(devices / state.node);
    return [`A replica lies over ${nodes} nodes: add --nnodes, --node-rank and --master-addr.`];
  }
  words.push("--data-parallel-size-local", String(local), "--data-parallel-address", "NODE0");
  words.push("--data-parallel-rpc-port", "13345");
  const starts = [];
  for (let start = local; start < layout.ranks; start += local) starts.push(start);
  return [
    "NODE0 is the address of the first node. The other nodes run the same with --headless and " +
      `--data-parallel-start-rank ${starts.join(", ")}.`,
  ];
}
