"""The frame of the HTML page: for wide and narrow screens, light and dark, and for print."""

from string import Template

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$name</title>
<style>
:root {
  --text: #1c2126; --quiet: #5a6570; --paper: #ffffff; --band: #f3f5f7; --line: #d5dae0; --link: #1b5f9e;
  --faster: #1b5f9e; --slower: #b23a12; --note: #fff3dc; --note-line: #d9902f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #dde3e9; --quiet: #98a4b0; --paper: #14181c; --band: #1f252b; --line: #37414a; --link: #7db8ee;
    --faster: #7db8ee; --slower: #ff9b73; --note: #33270f; --note-line: #d9902f;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 64rem; color: var(--text); background: var(--paper);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif;
}
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.4rem; margin: 3rem 0 .8rem; padding-bottom: .3rem; border-bottom: 2px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
h4 { font-size: 1rem; margin: 1.2rem 0 .4rem; color: var(--quiet); }
a { color: var(--link); }
p { max-width: 46rem; }
.note { background: var(--note); border-left: 4px solid var(--note-line); padding: .6rem .9rem; font-weight: 600; }
nav ul { list-style: none; margin: 1rem 0; padding: .8rem 1rem; background: var(--band); columns: 18rem; }
nav .level2 { font-weight: 600; }
nav .level3 { padding-left: 1rem; font-size: .9rem; }
.table, .chart { overflow-x: auto; margin: .8rem 0 1.2rem; }
table { border-collapse: collapse; font-size: .85rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { vertical-align: bottom; border-bottom: 2px solid var(--line); }
.text { text-align: left; }
td.text:first-child { white-space: normal; min-width: 11rem; max-width: 22rem; }
td.long { white-space: normal; min-width: 14rem; overflow-wrap: anywhere; }
@media screen and (min-width: 50rem) { td.text:first-child { min-width: 17rem; } }
tbody tr:nth-child(even) { background: var(--band); }
.faster { color: var(--faster); font-weight: 600; }
.slower { color: var(--slower); font-weight: 700; }
.best { font-weight: 700; }
.error { color: var(--slower); }
.chart img { display: block; width: 100%; max-width: 56rem; min-width: 40rem; height: auto; }
@media (prefers-color-scheme: dark) { .chart img { filter: invert(.92) hue-rotate(180deg); } }
@media print {
  @page { margin: 1.2cm; }
  :root { --text: #000; --paper: #fff; --band: #fff; --quiet: #333; --line: #999; --faster: #1b5f9e;
    --slower: #b23a12; --note: #fff; }
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  nav { display: none; }
  .table, .chart { overflow: visible; }
  table { font-size: 7pt; }
  th, td { padding: 1pt 3pt; white-space: normal; }
  td.text:first-child, td.long { min-width: 0; }
  thead { display: table-header-group; }
  tr, .chart { break-inside: avoid; }
  h2, h3, h4 { break-after: avoid; }
  .chart img { min-width: 0; width: auto; max-width: 100%; max-height: 24cm; filter: none; }
}
</style>
</head>
<body>
$title
<nav><ul>
$contents
</ul></nav>
$body
</body>
</html>
""")
