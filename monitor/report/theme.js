/** Light or dark: what the reader chose, else what the system prefers. Runs before anything is painted. */
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const stored = () => {
    try {
      return localStorage.getItem("repflow-theme") ?? "";
    } catch {
      return ""; // a browser that lets no file:// page store anything
    }
  };
  let chosen = stored();
  const apply = () => {
    document.documentElement.dataset.theme = chosen || (dark.matches ? "dark" : "light");
    document.dispatchEvent(new Event("theme"));
  };
  window.repflowTheme = {
    get: () => chosen,
    set(theme) {
      chosen = theme;
      try {
        localStorage.setItem("repflow-theme", theme);
      } catch {
        // It holds until the page is closed, then.
      }
      apply();
    },
  };
  dark.addEventListener("change", apply);
  apply();
})();
