// Teaching something new: pictures marked as yes and as no, a name, and an expert of it a few seconds later.
import { ask, button, find, make, says, stored } from "./base.js";
import { square } from "./files.js";
import { crop, choose, chosenIndex } from "./picture.js";

const KEY = "mixer taught";
const WANTED = 12;
const root = find("teach");
let marks = { yes: [], no: [] };
let family = "";
let taught = stored(localStorage, KEY) ?? []; // {family, name, yes, no}: enough to teach them again
let actions = {};

const name = make("input", { type: "text", id: "taught-name", maxlength: 24, placeholder: "tired", autocomplete: "off", oninput: () => draw() });
const line = make("p", { id: "teach-says", role: "status" });
const panel = make("div");
const start = button("Teach it", () => teach(), { id: "teach-go", class: "main" });

/** `act` = {teach(wanted, progress) -> result, changed(name, weight, gone)}: how a run is begun, and what to do when experts changed. */
export const teachPanel = (act) => {
    actions = act;
    root.replaceChildren(
        make("p", { class: "hint" }, `Mark about ${WANTED} pictures as yes and ${WANTED} as no, and name what they show. A picture is chosen by a click; Y and N mark it. Pictures of yours may be dropped on either side.`),
        make("div", { class: "field" }, make("label", { for: "taught-name" }, "Name"), name, start),
        line, panel,
    );
    draw();
};

/** Marks of one family are no use to another. */
export const ofFamily = (next) => {
    if (next !== family) marks = { yes: [], no: [] };
    family = next;
    draw();
};

/** Marks the chosen picture. */
export const mark = (kind, next) => {
    const picture = crop(chosenIndex());
    if (!picture) return says("Choose a picture first.");
    put(kind, picture);
    says(`Marked as ${kind}: ${marks.yes.length} yes, ${marks.no.length} no.`);
    if (next) choose(next);
};

const put = (kind, picture) => {
    for (const each of ["yes", "no"]) marks[each] = marks[each].filter((other) => other !== picture);
    marks[kind].push(picture);
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

const draw = () => {
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
        make("div", { class: "thumbs" }, marks[kind].map((picture) => button("", () => {
            marks[kind] = marks[kind].filter((other) => other !== picture);
            draw();
        }, { "aria-label": `Remove this ${kind}`, title: "Removes it", style: `background-image:url(${picture})` }))),
        make("label", { class: "file" }, "Pictures of yours ", make("input", { type: "file", accept: "image/*", multiple: true, onchange: take(kind) })),
    );
    const own = taught.filter((each) => each.family === family);
    panel.replaceChildren(
        make("div", { class: "two" }, side("yes"), side("no")),
        own.length ? make("h3", {}, "Taught by you") : "",
        ...own.map((each) => make(
            "div", { class: "line" }, make("b", {}, each.name.replaceAll("_", " ")), each.sure ? make("span", { class: "hint" }, each.sure) : "",
            button("Mark more", () => { marks = { yes: [...each.yes], no: [...each.no] }; name.value = each.name; draw(); }),
            button("Save to models", () => save(each)), button("Forget", () => forget(each)),
        )),
    );
};

const remember = (each) => {
    taught = [each, ...taught.filter((other) => other.family !== each.family || other.name !== each.name)].slice(0, 8);
    while (taught.length && !stored(localStorage, KEY, taught)) taught.pop();
};

const teach = async (wanted = { family, name: name.value.trim(), ...marks }) => {
    line.textContent = "Learning…";
    const said = await actions.teach(wanted, (text) => { line.textContent = text; });
    line.textContent = said.problem ?? said.said;
    says(line.textContent);
    if (said.problem) return;
    remember({ ...wanted, name: said.name, sure: said.sure });
    draw();
    await actions.changed(`${wanted.family}/${said.name}`, said.weight);
};

const forget = async (each) => {
    taught = taught.filter((other) => other !== each);
    stored(localStorage, KEY, taught);
    await ask("forget", { name: `${each.family}/${each.name}` });
    draw();
    await actions.changed(null, 0, `${each.family}/${each.name}`);
};

const save = async (each) => {
    const said = await ask("keep", { name: `${each.family}/${each.name}` });
    line.textContent = said.problem ?? said.said;
};

/** Teaches again what this browser knows and the server has forgotten. */
export const again = async (known) => {
    for (const each of taught) if (!known.includes(`${each.family}/${each.name}`)) {
        line.textContent = `Teaching ${each.name} again…`;
        const said = await actions.teach(each, () => {});
        line.textContent = said.problem ?? said.said;
    }
    return taught.some((each) => !known.includes(`${each.family}/${each.name}`));
};
