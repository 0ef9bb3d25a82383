// Teaching something new: pictures marked as yes and as no, a name, and an expert of it a few seconds later.
import { ask, button, find, make, redraw, says, stored } from "./base.js";
import { square } from "./files.js";
import { crop } from "./picture.js";
import { state } from "./state.js";

const KEY = "mixer taught";
const WANTED = 12;
const root = find("teach");
let actions = {};

const name = make("input", { type: "text", id: "taught-name", maxlength: 24, placeholder: "tired", autocomplete: "off", oninput: () => draw() });
const line = make("p", { id: "teach-says", role: "status" });
const panel = make("div");
const start = button("Teach it", () => teach(), { id: "teach-go", class: "main" });

export const progress = (text) => { line.textContent = text; };

/** `act` = {teach(wanted) -> result, changed(name, weight, gone)}: how a run is begun, and what to do when experts changed. */
export const teachPanel = (act) => {
    actions = act;
    state.taught = stored(localStorage, KEY) ?? [];
    root.replaceChildren(
        make("p", { class: "hint" }, `Mark about ${WANTED} pictures as yes and ${WANTED} as no, and name what they show. A picture is chosen by a click; Y and N mark it. Pictures of yours may be dropped on either side.`),
        make("div", { class: "field" }, make("label", { for: "taught-name" }, "Name"), name, start),
        line, panel,
    );
    draw();
};

/** Marks the chosen picture. */
export const mark = (kind) => {
    const picture = crop(state.chosen);
    if (!picture) return says("Choose a picture first.");
    put(kind, picture);
    says(`Marked as ${kind}: ${state.marks.yes.length} yes, ${state.marks.no.length} no.`);
};

const drop = (kind, picture) => { state.marks[kind] = state.marks[kind].filter((other) => other !== picture); };

const put = (kind, picture) => {
    for (const each of ["yes", "no"]) drop(each, picture);
    state.marks[kind].push(picture);
    draw();
};

const take = (kind) => async (event) => {
    for (const file of [...event.target.files].slice(0, 64)) {
        try {
            put(kind, await square(file, 128));
        } catch {
            says(`${file.name} is no picture that can be read.`);
        }
    }
};

export const draw = () => {
    const { marks, family } = state;
    const few = Math.min(marks.yes.length, marks.no.length) < 3;
    start.disabled = few || !name.value.trim();
    start.title = few ? "Mark three of each at least, better a dozen" : name.value.trim() ? "" : "Give it a name";
    const side = (kind) => make(
        "div", { class: "marked", ondrop: (event) => {
            event.preventDefault();
            event.stopPropagation(); // elsewhere, what is dropped is a picture to start from
            take(kind)({ target: event.dataTransfer });
        } },
        make("h3", {}, `${kind === "yes" ? "Yes" : "No"}: ${marks[kind].length} of ${WANTED}`),
        make("div", { class: "thumbs" }, marks[kind].map((picture, index) => button("", () => {
            drop(kind, picture);
            draw();
        }, { "aria-label": `Remove this ${kind}`, title: "Removes it", "data-key": `${kind} ${index}`, style: `background-image:url(${picture})` }))),
        make("label", { class: "file" }, "Pictures of yours ", make("input", { type: "file", accept: "image/*", multiple: true, "data-key": `files ${kind}`, onchange: take(kind) })),
    );
    const own = state.taught.filter((each) => each.family === family);
    redraw(
        panel,
        make("div", { class: "two" }, side("yes"), side("no")),
        own.length ? make("h3", {}, "Taught by you") : "",
        ...own.map((each) => make(
            "div", { class: "line" }, make("b", {}, each.name.replaceAll("_", " ")), each.sure ? make("span", { class: "hint" }, each.sure) : "",
            button("Mark more", () => { state.marks = { yes: [...each.yes], no: [...each.no] }; name.value = each.name; draw(); }, { "data-key": `more ${each.name}` }),
            button("Save to models", () => save(each), { "data-key": `save ${each.name}` }), button("Forget", () => forget(each), { "data-key": `forget ${each.name}` }),
        )),
    );
};

const remember = (each) => {
    state.taught = [each, ...state.taught.filter((other) => other.family !== each.family || other.name !== each.name)].slice(0, 8);
    while (state.taught.length && !stored(localStorage, KEY, state.taught)) state.taught.pop();
};

const teach = async () => {
    const wanted = { family: state.family, name: name.value.trim(), ...state.marks };
    progress("Learning…");
    const said = await actions.teach(wanted);
    progress(said.problem ?? said.said);
    says(line.textContent);
    if (said.problem) return;
    remember({ ...wanted, name: said.name, sure: said.sure });
    draw();
    await actions.changed(`${wanted.family}/${said.name}`, said.weight);
};

const forget = async (each) => {
    state.taught = state.taught.filter((other) => other !== each);
    stored(localStorage, KEY, state.taught);
    await ask("forget", { name: `${each.family}/${each.name}` });
    draw();
    await actions.changed(null, 0, `${each.family}/${each.name}`);
};

const save = async (each) => {
    const said = await ask("keep", { name: `${each.family}/${each.name}` });
    progress(said.problem ?? said.said);
};

/** Teaches again what this browser knows and the server has forgotten. */
export const again = async (known) => {
    const forgotten = state.taught.filter((each) => !known.includes(`${each.family}/${each.name}`));
    for (const each of forgotten) {
        progress(`Teaching ${each.name} again…`);
        const said = await actions.teach(each);
        progress(said.problem ?? said.said);
    }
    return forgotten.length > 0;
};
