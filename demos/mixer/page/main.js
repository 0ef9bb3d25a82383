// The page: what is drawn follows from its state, and what is pressed changes it.
import { allow, ask, button, copy, download, find, fromAddress, lines, make, redraw, says, stamp, toAddress } from "./base.js";
import * as easel from "./easel.js";
import * as explore from "./explore.js";
import { texts } from "./files.js";
import { onTab, openTab, shortcutsFor } from "./keys.js";
import { palette, surprise } from "./palette.js";
import * as picture from "./picture.js";
import { family, state } from "./state.js";
import * as strip from "./strip.js";
import * as teach from "./teach.js";
import * as why from "./why.js";

const FEW = 4; // pictures of a pipeline, which takes its time

// -- what is drawn ---------------------------------------------------------------------------------------

const note = (problem, said = "") => {
    const text = problem || said;
    const [first, ...rest] = text.split("\n");
    state.problem = problem;
    find("note").replaceChildren(...(text ? [make(
        "div", { class: problem ? "note alert" : "note", role: problem ? "alert" : "status" }, first,
        rest.length ? make("pre", { tabindex: 0 }, rest.join("\n")) : "",
    )] : []));
};

const drawPalette = () => {
    palette(find("palette"), family(), state.mix, state.world.most, (mix, quiet) => change(mix, quiet));
    if (!state.mix) find("palette").prepend(make(
        "p", { class: "note" }, "This recipe was written by hand, and is more than the controls can show. ",
        button("Use the controls", () => openFamily(state.family)),
    ));
};

const drawFamilies = () => {
    const tab = (each) => make(
        "label", {}, make("input", { type: "radio", name: "family", value: each.name, checked: each.name === state.family, onchange: () => openFamily(each.name) }),
        make("span", {}, each.title),
    );
    const group = (legend, list) => (list.length ? make("fieldset", { class: "chips" }, make("legend", { class: list[0].method ? null : "unseen" }, legend), list.map(tab)) : "");
    find("families").replaceChildren(group("Family", state.world.families.filter((each) => !each.method)));
    find("methods").replaceChildren(group("Families that show how energies may be had", state.world.families.filter((each) => each.method)));
};

const drawStarts = () => {
    const card = (title, picture, act, more) => make("button", { type: "button", class: "start", onclick: act, "data-key": title, ...more }, picture, make("span", {}, title));
    const sign = (text) => make("span", { class: "dice", "aria-hidden": "true" }, text);
    const cards = state.world.starts.filter((each) => each.shown).map((each) => card(
        each.title, each.thumb ? make("img", { src: each.thumb, alt: "", width: 64, height: 64, class: "pixels" }) : sign("…"), () => begin(each),
    ));
    redraw(find("starts"), cards, card("Surprise me", sign("?"), () => surprised(), { id: "surprise", title: "A mix at random (R)" }));
};
/** The server draws them while the page is read. */
const awaitThumbs = async () => {
    const said = await ask("thumbs");
    if (said.problem) return;
    const before = state.world.starts.filter((each) => each.thumb).length;
    state.world.starts.forEach((each, index) => { each.thumb = said.thumbs[index]; });
    if (state.world.starts.filter((each) => each.thumb).length > before) drawStarts();
    if (said.more) setTimeout(awaitThumbs, 1500);
};

const draw = () => {
    drawPalette();
    for (const input of document.querySelectorAll("input[name=family]")) input.checked = input.value === state.family;
    find("words").textContent = state.words ? `You ask for: ${state.words}.` : "";
    if (document.activeElement !== find("recipe")) find("recipe").value = state.recipe;
    for (const name of ["chains", "steps"]) {
        find(name).value = state.numbers[name];
        find(name).nextElementSibling.value = state.numbers[name];
    }
    find("seed").value = state.numbers.seed;
    find("cannot").replaceChildren(make("dl", {}, family().cannot.map((each) => [make("dt", {}, each.name), make("dd", {}, each.text)])));
    const begun = state.start;
    find("starting").hidden = !begun;
    find("starting").replaceChildren(...(begun ? [
        make("img", { src: begun.pictures[0], alt: "", class: "pixels", width: 32, height: 32 }), make("span", {}, `Chains start from ${begun.name}.`),
        button("Noise again", () => setStart(null)),
    ] : []));
    drawButtons();
};

const drawButtons = () => {
    const busy = Boolean(state.busy);
    const why = state.recipe ? "" : "Switch on at least one expert first";
    allow(find("play"), busy ? "It runs already; Stop ends it" : why);
    allow(find("sample"), busy ? "Something runs; Stop ends it" : why);
    allow(find("stop"), busy ? "" : "Nothing runs");
    allow(find("shake"), state.busy === "play" ? "" : "Only running chains can be shaken: press Play");
    allow(find("undo"), state.now > 0 ? "" : "Nothing to go back to");
    allow(find("redo"), state.now < state.past.length - 1 ? "" : "Nothing to go forward to");
    allow(find("pack"), state.shown.count ? "" : "There is no picture yet");
};

// -- the mix and its history -----------------------------------------------------------------------------

/** Notes what is asked for now, in the address too; one step back for one drag of a slider, which is quiet. */
const record = (quiet = false) => {
    const now = { recipe: state.recipe, ...state.numbers };
    history.replaceState(null, "", toAddress({ mix: state.recipe, ...state.numbers }));
    if (JSON.stringify(state.past[state.now]) === JSON.stringify(now)) return;
    const sliding = quiet && state.now > 0 && record.at > Date.now() - 1000;
    record.at = Date.now();
    state.past = [...state.past.slice(0, state.now + (sliding ? 0 : 1)), now].slice(-100);
    state.now = state.past.length - 1;
    drawButtons();
};
const go = async (by, what) => {
    const wanted = state.past[state.now + by];
    if (!wanted) return;
    state.now += by;
    await restore(wanted);
    drawButtons();
    says(`${what}: ${state.words}.`);
};
const undo = () => go(-1, "Undone");
const redo = () => go(1, "Done again");

let asking = 0;
/** Asks what is wanted means, and shows the answer, unless something else has been asked since. */
const read = async (wanted, { quiet = false, keepSteps = true } = {}) => {
    const mine = ++asking;
    const before = state.family;
    const said = await ask("read", wanted);
    if (mine !== asking) return said;
    if (said.recipe !== undefined) state.recipe = said.recipe;
    if (said.problem) {
        note(said.problem);
        if (said.mix) state.mix = said.mix;
        if (!quiet) draw();
        else drawButtons();
        return said;
    }
    note("", said.said);
    state.mix = said.mix;
    state.words = said.words;
    state.family = said.family;
    for (const name of ["num_chains", "num_steps", "seed"]) if (said[name] !== undefined) state.numbers[name.replace("num_", "")] = said[name];
    if (!keepSteps || (state.family !== before && said.num_steps === undefined)) state.numbers.steps = said.steps;
    if (JSON.stringify(state.parts) !== JSON.stringify(said.parts)) {
        state.parts = said.parts;
        explore.drawAxes();
    }
    if (state.family !== before) { // what was marked or begun at of one family is no use to another
        state.marks = { yes: [], no: [] };
        setStart(null, true);
        teach.draw();
    }
    if (quiet) {
        find("words").textContent = `You ask for: ${state.words}.`;
        if (document.activeElement !== find("recipe")) find("recipe").value = state.recipe;
    } else draw();
    record(quiet);
    return said;
};

const change = (mix, quiet) => {
    state.mix = mix;
    if (!quiet) drawPalette();
    return read({ mix }, { quiet });
};
const openFamily = (name) => {
    if (state.mix) state.mixes[state.mix.family] = state.mix;
    const kept = state.mixes[name];
    if (kept) return read({ mix: kept });
    const start = state.world.starts.find((each) => each.family === name);
    return start ? read({ recipe: start.recipe }) : read({ mix: { family: name, base: true, picks: {} } });
};
const begin = async (start) => {
    setStart(null, true);
    await read({ recipe: start.recipe }, { keepSteps: false });
    says(`${start.title}.`);
    if (start.photo) {
        openTab("Start from");
        find("start-file").focus();
        return says("Choose a picture of yours, paint over where the glasses go, and press Play.");
    }
    if (family().prompts) return find("prompt").focus();
    if (state.busy !== "play") play();
};
const surprised = async () => {
    await read({ mix: surprise(state.world.families) });
    says(`You ask for: ${state.words}.`);
    if (state.busy !== "play") play();
};

/** Brings back a mix with its numbers: {recipe, seed, chains, steps}. */
const restore = async ({ recipe, seed, chains, steps }) => {
    const said = await read({ texts: { recipe, seed, num_chains: chains, num_steps: steps } });
    rerun();
    return said;
};
strip.onRestore(async (item) => {
    stop();
    await restore(item);
    showSaved(item);
    const live = item.live ? " It was live: Sample draws others like it, and Play goes on from it." : "";
    if (item.live) await goOnFrom(item);
    says(`Brought back: ${item.words}.${live}`);
    find("caption").textContent = `${item.words} · seed ${item.seed}.${live}`;
});
const showSaved = (item) => {
    picture.show({ picture: item.picture, count: item.chains, alt: `${item.chains} samples of ${item.recipe}`, recipe: item.recipe, misses: null });
    offerSave(item);
};
const goOnFrom = async (item) => {
    await find("picture").querySelector("img").decode().catch(() => {});
    setStart({ pictures: picture.crops(), mask: "", level: 0.3, name: "the picture" }, true);
};

// -- what runs -------------------------------------------------------------------------------------------

let current = null; // of the run that has the page
const setStart = (start, silent = false) => {
    state.start = start;
    easel.clear(start?.name);
    if (silent) return;
    draw();
    rerun();
};

const run = async (kind, more = {}) => {
    current?.abort();
    const mine = (current = new AbortController());
    state.busy = kind;
    state.stopped = false;
    let last = null;
    drawButtons();
    try {
        for await (const message of lines({ kind, recipe: state.recipe, ...state.numbers, start: state.start, ...more }, mine.signal)) {
            if (mine !== current) return null;
            last = message;
            (tell[message.kind] ?? (() => {}))(message, kind);
        }
    } catch (error) {
        if (mine !== current || error.name === "AbortError") return null;
        note(`The connection was lost: ${error.message}`);
    }
    if (mine !== current) return null;
    state.busy = "";
    drawButtons();
    return last;
};

const clock = (seconds) => (seconds >= 90 ? `${Math.round(seconds / 60)} min` : `${Math.max(1, Math.round(seconds))} s`);
const missing = (misses) => (misses?.length ? ` · ${misses.length} still ${misses.length > 1 ? "miss" : "misses"} something` : "");
const tell = {
    wait: (message) => { find("caption").textContent = `In the queue, place ${message.place}.`; },
    frame: (message, kind) => {
        const what = kind === "play" ? "running chains" : "samples";
        picture.show({ ...message, alt: `${message.count} ${what} of ${message.recipe}` });
        const left = message.left ? ` · ${clock(message.left)} left` : "";
        const rate = message.rate ? ` · ${message.rate.toFixed(0)} frames/s` : "";
        find("caption").textContent = `${message.of ? "step" : "playing · step"} ${message.step}${message.of ? ` of ${message.of}${left}` : rate}${missing(state.shown.misses)}`;
        if (message.terms) why.explain(message);
        if (message.problem !== undefined && message.problem !== state.told) {
            state.told = message.problem;
            if (message.problem || state.problem) note(message.problem);
        }
    },
    end: (message, kind) => {
        if (message.picture) {
            picture.show({ ...message, alt: `${message.count} samples of ${message.recipe}` });
            why.explain(message);
            const item = { ...message, words: state.words || message.recipe, chains: message.count, steps: state.numbers.steps };
            offerSave(item);
            strip.keep(Object.fromEntries(["recipe", "words", "seed", "chains", "steps", "picture", "live"].map((name) => [name, item[name]])));
            const where = message.stopped ? `stopped at step ${message.step}` : `step ${message.step}`;
            find("caption").textContent = `${where}${message.of ? ` of ${message.of}` : ""} · seed ${message.seed}${missing(message.misses)}`;
            says(message.stopped ? "Stopped." : "The pictures are ready.");
        } else find("caption").textContent = message.said;
        if (message.report) find("report").textContent = message.report;
        if (message.picture) note("", message.said);
    },
    grid: explore.showGrid,
    alone: (message) => why.showAlone(message.pictures),
    teach: (message) => teach.progress(message.said),
    error: (message) => note(message.problem),
};

/** Runs something beside chains that play, and lets them play on after it. */
const aside = async (kind, more) => {
    const was = state.busy;
    const last = await run(kind, more);
    if (was === "play" && last && last.kind !== "taught" && !state.stopped) play();
    return last;
};

const play = () => {
    if (!state.recipe) return says("Switch on at least one expert first.");
    state.along = {};
    state.told = "";
    picture.blank("Loading the experts…");
    picture.show({ misses: null });
    return run("play");
};
const sample = () => {
    if (!state.recipe) return says("Switch on at least one expert first.");
    state.along = {};
    picture.show({ misses: null });
    find("caption").textContent = "Waiting for the first step…";
    return run("sample");
};
const stop = () => {
    state.stopped = true;
    if (state.busy) return ask("stop");
};
/** Begins anew what runs on, where something changed that it cannot follow. */
const rerun = () => { if (state.busy === "play") play(); };

const offerSave = (item) => {
    const link = find("save");
    link.href = item.picture;
    link.download = `samples-${stamp()}-seed-${item.seed}.png`;
    link.removeAttribute("aria-disabled");
};

// -- what is pressed -------------------------------------------------------------------------------------

const acts = {
    like: async () => {
        setStart({ pictures: [picture.crop(state.chosen)], mask: "", level: 1.2, name: `picture ${state.chosen + 1}` }, true);
        draw();
        await play();
    },
    vary: async () => {
        setStart({ pictures: picture.crops(), mask: "", level: 3, keep: [state.chosen], name: `picture ${state.chosen + 1}, which stays` }, true);
        state.numbers.seed = Math.floor(Math.random() * 1e6);
        draw();
        await sample();
        setStart(null, true);
        draw();
    },
    large: async () => download(await picture.large(state.chosen), `picture-${stamp()}.png`),
    paint: async () => {
        openTab("Start from");
        await easel.begin(picture.crop(state.chosen), `picture ${state.chosen + 1}`);
        find("easel").focus();
    },
    yes: () => teach.mark("yes"),
    no: () => teach.mark("no"),
};
for (const each of find("menu").querySelectorAll("button")) each.addEventListener("click", acts[each.dataset.do]);
picture.onChoose((index) => {
    find("menu").hidden = index < 0;
    if (index >= 0 && !find("why").hidden) why.lookAt();
});

const numbered = (name) => {
    const input = find(name);
    input.addEventListener("input", () => { if (input.nextElementSibling.tagName === "OUTPUT") input.nextElementSibling.value = input.value; });
    input.addEventListener("change", () => {
        const [low, high] = [Number(input.min), Number(input.max)];
        state.numbers[name] = Math.min(Math.max(Math.round(Number(input.value)) || low, low), high);
        draw();
        record();
        rerun();
    });
};
for (const name of ["chains", "steps", "seed"]) numbered(name);
const dice = () => {
    state.numbers.seed = Math.floor(Math.random() * 1e6);
    draw();
    record();
    rerun();
    says(`Seed ${state.numbers.seed}.`);
};
find("dice").addEventListener("click", dice);
find("play").addEventListener("click", play);
find("sample").addEventListener("click", sample);
find("stop").addEventListener("click", stop);
const shake = async () => {
    const said = await ask("shake", { chain: state.chosen < 0 ? null : state.chosen });
    const what = state.chosen >= 0 && said.shaken === 1 ? `picture ${state.chosen + 1} begins` : said.shaken === 1 ? "one picture begins" : `${said.shaken} pictures begin`;
    says(said.shaken ? `Shaken: ${what} anew.` : "Nothing runs that could be shaken.");
};
find("shake").addEventListener("click", shake);
find("undo").addEventListener("click", undo);
find("redo").addEventListener("click", redo);
find("link").addEventListener("click", () => copy(location.href, "The address"));
for (const name of ["python", "command"]) find(name).addEventListener("click", async (event) => {
    const said = await ask("code", { recipe: state.recipe, ...state.numbers });
    if (said.problem) return note(said.problem);
    const label = event.target.textContent;
    if (await copy(said[name], label.replace("Copy as ", ""))) {
        event.target.textContent = "Copied";
        setTimeout(() => { event.target.textContent = label; }, 1500);
    }
});
find("pack").addEventListener("click", async () => {
    const said = await ask("pack", { pictures: picture.crops() });
    if (said.problem) return note(said.problem);
    download(URL.createObjectURL(said.blob), `samples-${stamp()}.zip`);
});
find("recipe").addEventListener("change", (event) => read({ recipe: event.target.value.trim() }));
find("recipe").addEventListener("keydown", async (event) => {
    if (event.key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    const said = await read({ recipe: event.target.value.trim() });
    if (!said.problem && state.busy !== "play") sample();
});

const opened = async (file) => {
    if (!file) return;
    const found = await texts(file);
    const said = await read({ texts: found });
    if (said.problem) return;
    const address = URL.createObjectURL(file);
    const item = { ...found, picture: address, words: state.words, ...state.numbers };
    showSaved(item);
    if (item.live) await goOnFrom(item);
    draw();
    note("", found.live ? "This picture was live, its chains had followed a changing mix: Sample draws others of this mix, and Play goes on from it." : "Sample draws this picture again.");
};
find("restore").addEventListener("change", (event) => { opened(event.target.files[0]); event.target.value = ""; });
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", async (event) => {
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    if (!file) return;
    if (file.type === "image/png" && (await texts(file)).recipe) return opened(file);
    openTab("Start from");
    easel.upload(file);
});

// -- the beginning ---------------------------------------------------------------------------------------

const chosenOnly = (name) => () => (state.chosen < 0 ? says("Choose a picture first.") : acts[name]());
shortcutsFor({
    p: ["Play", play], s: ["Sample", sample], Escape: ["Stop", stop], k: ["Shake the chosen picture, or those that miss something", shake], d: ["New seed", dice],
    r: ["Surprise me", surprised],
    m: ["More like the chosen picture", chosenOnly("like")], v: ["Keep the chosen one, vary the rest", chosenOnly("vary")],
    y: ["Mark the chosen picture as yes", chosenOnly("yes")], n: ["Mark it as no", chosenOnly("no")],
}, undo, redo);
onTab((name) => { if (name === "Why" && state.chosen >= 0) why.lookAt(); });

const openWorld = async () => {
    const world = await ask("world");
    if (world.problem) return note(world.problem);
    state.world = world;
    find("chains").max = world.limits.chains;
    find("steps").max = world.limits.steps;
    state.numbers.chains = Math.min(state.numbers.chains, world.limits.chains);
    drawFamilies();
    return world;
};

const open = async () => {
    why.whyPanel(() => aside("alone"));
    explore.explorePanel((axes) => aside("grid", axes));
    easel.easelPanel(find("begin"), {
        noise: () => setStart(null),
        example: async () => {
            const said = await ask("example", { recipe: state.recipe });
            if (said.problem) return note(said.problem);
            await easel.begin(said.picture, said.described);
        },
        change: (start) => { state.start = start; draw(); rerun(); },
    });
    teach.teachPanel({
        teach: async (wanted) => {
            const last = await aside("teach", wanted);
            return last?.kind === "taught" ? last : { problem: last?.problem ?? last?.said ?? "It was interrupted." };
        },
        changed: async (name, weight, gone) => {
            await openWorld();
            const mix = structuredClone(state.mix ?? { family: state.family, base: true, picks: {} });
            if (name) mix.picks[name] = { role: "AND", together: false, values: { yes: weight } };
            else delete mix.picks[gone];
            await change(mix);
            if (name || state.busy === "play") play();
        },
    });
    openTab("Why");
    drawButtons();
    const world = await openWorld();
    if (!world) return;
    drawStarts();
    awaitThumbs();
    if (world.problems.length) note(world.problems.join("\n"));
    if (!world.families.length) return;
    const known = world.families.flatMap((each) => each.controls.map((control) => control.name));
    if (await teach.again(known)) await openWorld();
    const asked = fromAddress(location.hash.slice(1));
    const first = world.starts[0];
    state.family = world.families[0].name;
    if (family().prompts) state.numbers.chains = FEW;
    if (asked.get("mix")) {
        const said = await read({ texts: { recipe: asked.get("mix"), seed: asked.get("seed") ?? "0", num_chains: asked.get("chains") ?? "16", num_steps: asked.get("steps") ?? "80" } });
        if (said.problem) draw();
    } else if (first) await read({ recipe: first.recipe }, { keepSteps: false });
    document.body.dataset.ready = "yes";
    if (family().prompts) return picture.blank("Type a prompt, and press Sample");
    if (new URLSearchParams(location.search).has("still")) return picture.blank("Press Play or Sample");
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) sample();
    else play();
};
open();
