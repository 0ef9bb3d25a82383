document.getElementById("login").addEventListener("submit", async (event) => {
    event.preventDefault();
    const answer = await fetch("login", { method: "POST", body: new FormData(event.target) });
    if (answer.ok) location.reload();
    else document.getElementById("says").textContent = "This is not the user or not the password.";
});
