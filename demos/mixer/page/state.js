// The page's state: all of it, here and nowhere else. What is drawn follows from it, and the server says what it means.
export const state = {
    world: null, // what can be mixed: {families, starts, problems, limits, most, keeps}

    // What is asked for.
    mix: null, // null where the recipe is beyond the controls
    family: "",
    recipe: "",
    words: "",
    parts: [], // whose weights can be moved: [{name, low, high}]
    numbers: { chains: 16, steps: 80, seed: 0 },
    start: null, // what chains begin at: {pictures, mask, level, keep, name}; noise where null

    // What is shown.
    busy: "", // what runs: play, sample, grid, alone, teach
    stopped: false, // whether Stop was pressed since that began
    problem: "",
    told: "", // what was wrong with running chains when it was told last
    shown: { count: 0, misses: null }, // the pictures: {picture, count, alt, misses, recipe}
    chosen: -1, // which of them; none below 0
    along: {}, // the energies of each part along the run, by name

    // What came before, and what is kept in this browser.
    past: [], // mixes with their numbers, to undo and redo
    now: -1, // which of them is asked for
    mixes: {}, // the last of each family
    prompts: new Map(), // typed so far, as controls; they stay when they are switched off
    film: [], // what was made: {id, recipe, words, seed, chains, steps, picture, live, star}
    compared: [], // ids of two of them
    marks: { yes: [], no: [] }, // pictures, to teach something new by
    taught: [], // {family, name, yes, no, sure}: enough to teach them again
};

export const family = () => state.world.families.find((each) => each.name === state.family);
