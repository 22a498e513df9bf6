// Before anything is drawn: the theme that was chosen here last, if one was.
try {
  const kept = localStorage.getItem("fedkeel-theme");
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
} catch {
  // no storage: the system's theme it is
}
