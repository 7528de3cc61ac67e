// INT8 Compile: what its nodes show while they work and afterwards; two commands; the settings of the compile cache.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const EVENT = "int8_compile"; // compile/comfyui/node_status.py
const WORKING = ["OptimizeModel", "CompileModel", "INT8LazyTorchCompile", "INT8QuantizeModel", "LoadINT8Model", "ApplyModes"];
const CHECK = "INT8CompileCheck";
const CHECK_WIDTH = 520; // px that its table takes
const SHOWING = ["ShowModes", CHECK]; // show their output text
const WIDGET = "shown";
const FONT = 12; // px
const LINE = 16; // px
const RESERVED = 4; // lines: most reports have three, and Details
const NODE_WIDTH = 320; // px, in which these fit
const MARGIN = 6; // px around the text in the classic renderer
const MAX_LINES = 20; // longer texts scroll
const HISTORY = 50; // prompts that are looked through for a report after a reload

const CHINESE = /[\u2e80-\uffef]/g;

let rules = []; // [pattern of a line, what is said for it], see translated

const doing = new Map(); // node -> { text, since }
const warned = new Set();

// A report in the user's language. $1 of what is said for a line is what the pattern's first group says, translated in turn.
function translated(line) {
    for (const [pattern, words] of rules) {
        const found = pattern.exec(line);
        if (found) return words.replace(/\$(\d)/g, (_, group) => translated(found[group] ?? ""));
    }
    return line;
}

const inUsersLanguage = (text) => text.split("\n").map(translated).join("\n");

async function loadRules() {
    if (app.extensionManager.setting?.get("Comfy.Locale") !== "zh") return;
    const response = await fetch(new URL("./reports.zh.json", import.meta.url));
    if (response.ok) rules = (await response.json()).map(([pattern, words]) => [new RegExp(`^${pattern}$`), words]);
}

let ruler;

// A Chinese letter is a square, whether or not this browser has it.
const widthOf = (word) => Math.max(ruler.measureText(word).width, FONT * (word.match(CHINESE)?.length ?? 0));

// How many lines a text takes in so many px. It breaks after spaces and hyphens, and between Chinese letters.
function lineCount(text, font, px) {
    ruler ??= document.createElement("canvas").getContext("2d");
    ruler.font = font;
    return text.split("\n").reduce((count, line) => {
        let used = 0;
        for (const word of line.match(/.*?(?:\s|-(?!\u2060)|[\u2e80-\uffef]|$)/g)) {
            const width = widthOf(word);
            if (used && used + widthOf(word.trimEnd()) > px) {
                count += 1;
                used = 0;
            }
            count += Math.max(0, Math.ceil(width / px) - 1);
            used += width;
        }
        return count + 1;
    }, 0);
}

// An arrow is not broken after its hyphen.
const unbroken = (text) => text.replaceAll("->", "-\u2060>");

function textWidget(node) {
    const known = node.widgets?.find((widget) => widget.name === WIDGET);
    if (known) return known;
    const font = `${FONT}px ${node.comfyClass === CHECK ? "monospace" : "sans-serif"}`;
    let reserved = 0; // lines
    const element = document.createElement("div");
    element.style.cssText = `box-sizing: border-box; width: 100%; height: 100%; overflow: auto; white-space: pre-wrap; padding: 4px 8px; user-select: text;
        overflow-wrap: anywhere; font: ${font}; line-height: ${LINE}px; color: var(--input-text); background: var(--comfy-input-bg); border-radius: 6px;`;
    const body = element.appendChild(document.createElement("div"));
    const more = element.appendChild(document.createElement("details"));
    more.hidden = true;
    more.innerHTML = `<summary style="cursor: pointer; opacity: 0.8">${translated("Details")}</summary><div></div>`;
    const details = more.lastElementChild;
    const lines = (text) => lineCount(text, font, Math.max(100, node.size[0] - 41));
    const shown = (open) => Math.max(reserved, lines(body.textContent) + (more.hidden ? 0 : 1 + (open ? lines(details.textContent) : 0)));
    const height = (open = more.open) => Math.min(shown(open), MAX_LINES) * LINE + 10 + 2 * MARGIN;
    const widget = node.addDOMWidget(WIDGET, "int8_compile_text", element, {
        getValue: () => body.textContent.replaceAll("\u2060", ""),
        setValue: (text) => { body.textContent = unbroken(text); },
        getMinHeight: () => height(),
        getMaxHeight: () => height(),
        margin: MARGIN,
        serialize: false,
    });
    widget.reserve = (count) => {
        reserved = count;
        element.style.minHeight = `${reserved * LINE + 8}px`;
    };
    widget.setDetails = (text) => {
        details.textContent = unbroken(text);
        more.hidden = !text;
    };
    let closed = 0; // px, the node's height before Details were opened; Nodes 2.0 gives it more than is asked for
    more.addEventListener("toggle", () => {
        if (more.open) closed = node.size[1];
        grow(node, more.open ? height(true) - height(false) : closed - node.size[1]);
    });
    widget.serialize = false; // neither in the saved workflow nor in the prompt: it is no input
    return widget;
}

// The room that the user gave to the node beyond its contents stays.
function grow(node, growth) {
    node.setSize([node.size[0], Math.max(node.computeSize()[1], node.size[1] + growth)]);
    app.canvas?.setDirty(true, true);
}

function show(node, text, details = "") {
    const known = node.widgets?.some((widget) => widget.name === WIDGET);
    if (!text && !known) return;
    const before = known ? node.computeSize()[1] : 0;
    const widget = textWidget(node);
    if (widget.value === text && widget.details === details) return;
    widget.value = text;
    widget.details = details;
    widget.setDetails(details);
    // A node that is loaded has the size that it had with its text.
    grow(node, known ? node.computeSize()[1] - before : 0);
}

function showStatus(node) {
    const work = doing.get(node);
    const seconds = work ? Math.floor((Date.now() - work.since) / 1000) : 0;
    if (work) return show(node, inUsersLanguage(work.text + (seconds ? `, ${seconds} s` : "")));
    const { short = "", text = "" } = node.int8CompileReport ?? {};
    const above = short.split("\n");
    show(node, inUsersLanguage(short), inUsersLanguage(text.split("\n").filter((line) => !above.includes(line)).join("\n")));
}

// id: of the prompt, "5:3" for node 3 in subgraph 5; a word where a prompt in API format was opened that names its nodes so.
function findNode(id) {
    let graph = app.rootGraph ?? app.graph;
    const path = String(id).split(":").map((part) => (isNaN(part) ? part : Number(part)));
    for (const part of path.slice(0, -1)) graph = graph?.getNodeById(part)?.subgraph;
    const node = graph?.getNodeById(path.at(-1));
    return node && WORKING.includes(node.type) ? node : undefined;
}

function* workingNodes(graph, prefix = "") {
    for (const node of graph.nodes) {
        if (WORKING.includes(node.type)) yield [`${prefix}${node.id}`, node];
        if (node.subgraph) yield* workingNodes(node.subgraph, `${prefix}${node.id}:`);
    }
}

function receive(id, entry) {
    const node = findNode(id);
    if (!node || !entry) return;
    node.int8CompileReport = entry;
    if (!entry.doing) doing.delete(node);
    else if (doing.get(node)?.text !== entry.doing) doing.set(node, { text: entry.doing, since: Date.now() });
    showStatus(node);
    for (const warning of entry.warnings ?? []) {
        if (!warned.has(warning)) toast("warn", node.title, inUsersLanguage(warning));
        warned.add(warning);
    }
}

function toast(severity, summary, detail) {
    app.extensionManager.toast.add({ severity, summary, detail, life: 15000 });
}

const reportOf = (output) => output?.[EVENT]?.[0]?.[0];

// After a reload: each node's report of its last run in this workflow, which the history has.
async function restore() {
    const missing = new Map([...workingNodes(app.rootGraph ?? app.graph)].filter(([, node]) => node.int8CompileReport === undefined));
    if (!missing.size) return;
    const response = await api.fetchApi(`/history?max_items=${HISTORY}`);
    if (!response.ok) return;
    const workflow = (app.rootGraph ?? app.graph).id;
    const runs = Object.values(await response.json()).sort((a, b) => b.prompt[0] - a.prompt[0]);
    for (const { prompt, outputs } of runs) {
        if (prompt[3]?.extra_pnginfo?.workflow?.id !== workflow) continue;
        for (const [id, node] of missing) {
            const entry = reportOf(outputs[id]);
            if (!entry || node.int8CompileReport !== undefined) continue;
            node.int8CompileReport = entry;
            showStatus(node);
        }
    }
}

// A window; the text keeps its columns.
function openReport(title, text, pictures) {
    const dialog = document.createElement("dialog");
    dialog.style.cssText = `width: min(60rem, 92vw); max-height: 88vh; margin: auto; padding: 16px; border: 1px solid var(--border-color);
        border-radius: 8px; background: var(--comfy-menu-bg); color: var(--input-text); overflow: auto;`;
    dialog.innerHTML = `<form method="dialog" style="display: flex; justify-content: space-between; align-items: center; font: bold 16px sans-serif">
        <span></span><button style="padding: 6px 14px; border: 1px solid; border-radius: 6px; cursor: pointer">${translated("Close")}</button></form>
        <pre style="white-space: pre-wrap; overflow-wrap: anywhere; user-select: text; font: 12px/1.4 monospace"></pre>`;
    dialog.querySelector("span").textContent = title;
    dialog.querySelector("pre").textContent = text;
    for (const picture of pictures) {
        const image = dialog.appendChild(document.createElement("img"));
        image.src = api.apiURL(`/view?${new URLSearchParams(picture)}`);
        image.style.maxWidth = "100%";
    }
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
}

// Runs a node that needs no input but its defaults; tell(title, text, pictures) shows what it says.
async function runNode(type, title, tell = (title, text) => toast("info", title, text)) {
    const definition = (await api.getNodeDefs())[type];
    if (!definition) return toast("warn", title, translated(`This version of INT8 Compile has no node ${type}.`));
    const inputs = {};
    for (const [name, [kind, options]] of Object.entries(definition.input.required ?? {})) {
        inputs[name] = options?.default ?? (Array.isArray(kind) ? kind[0] : options?.options?.[0]);
    }
    const id = `${EVENT}_${type}`;
    const stop = () => {
        api.removeEventListener("executed", done);
        api.removeEventListener("execution_error", failed);
        api.removeEventListener("execution_interrupted", failed);
    };
    const done = ({ detail }) => {
        if (detail.node !== id) return;
        stop();
        tell(title, (detail.output?.text ?? []).join("\n"), detail.output?.images ?? []);
    };
    const failed = ({ detail }) => {
        if (detail.node_id !== id) return;
        stop();
        toast("error", title, detail.exception_message ?? translated("Interrupted."));
    };
    api.addEventListener("executed", done);
    api.addEventListener("execution_error", failed);
    api.addEventListener("execution_interrupted", failed);
    try {
        await api.queuePrompt(0, { output: { [id]: { class_type: type, inputs } }, workflow: {} });
    } catch (error) {
        stop();
        toast("error", title, String(error.message ?? error));
    }
}

function runCheck() {
    const title = translated("INT8 Compile Check");
    toast("info", title, translated("Measuring: some seconds, after what is queued."));
    return runNode(CHECK, title, openReport);
}

app.registerExtension({
    name: "int8_compile",
    commands: [
        { id: "INT8Compile.ClearCache", label: "INT8 Compile: Clear compile cache", icon: "pi pi-trash",
          function: () => runNode("ClearCompileCache", translated("Clear compile cache")) },
        { id: "INT8Compile.Check", label: "INT8 Compile: Run check", icon: "pi pi-gauge",
          function: runCheck },
    ],
    menuCommands: [{ path: ["Extensions", "INT8 Compile"], commands: ["INT8Compile.ClearCache", "INT8Compile.Check"] }],
    settings: [
        { id: "INT8Compile.Cache.Enabled", name: "Keep what was compiled for the next start", type: "boolean", defaultValue: true,
          category: ["INT8 Compile", "Compile cache", "Enabled"] },
        { id: "INT8Compile.Cache.SizeLimit", name: "Size limit (GB)", type: "number", defaultValue: 5, attrs: { min: 0.1, max: 1000 },
          category: ["INT8 Compile", "Compile cache", "SizeLimit"], tooltip: "What was not used for longest is deleted first." },
        { id: "INT8Compile.Verify", name: "Check against the uncompiled model", type: "combo", defaultValue: "first",
          options: ["first", "always", "off"], category: ["INT8 Compile", "Checks", "Verify"],
          tooltip: "first: at the first run, at each new size and now and then; always: every block at every step, slow. For models compiled from now on." },
    ],
    async setup() {
        api.addEventListener(EVENT, ({ detail }) => receive(detail.node, detail));
        api.addEventListener("executed", ({ detail }) => receive(detail.display_node ?? detail.node, reportOf(detail.output)));
        for (const end of ["execution_success", "execution_error", "execution_interrupted"]) {
            api.addEventListener(end, () => {
                const nodes = [...doing.keys()];
                doing.clear();
                nodes.forEach(showStatus);
            });
        }
        setInterval(() => [...doing.keys()].forEach(showStatus), 1000);
        await loadRules();
    },
    afterConfigureGraph: restore,
    nodeCreated(node) {
        if (!WORKING.includes(node.comfyClass)) return;
        const widget = textWidget(node);
        widget.reserve(RESERVED);
        node.setSize([Math.max(node.size[0], NODE_WIDTH), node.computeSize()[1]]);
        const { onConfigure } = node;
        node.onConfigure = function (saved) { // a node of an older workflow takes no more room than it had, until it reports
            onConfigure?.apply(this, arguments);
            if (saved.size?.[1] < this.computeSize()[1]) widget.reserve(0);
        };
    },
    beforeRegisterNodeDef(nodeType, nodeData) {
        if (!SHOWING.includes(nodeData.name)) return;
        const { onExecuted } = nodeType.prototype;
        nodeType.prototype.onExecuted = function (message) {
            onExecuted?.apply(this, arguments);
            if (this.type === CHECK) this.setSize([Math.max(this.size[0], CHECK_WIDTH), this.size[1]]);
            show(this, message.text[0]);
        };
    },
});
