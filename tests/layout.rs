//! Rules of the repository that no compiler knows: where things are, what may use what, and that documents agree with
//! the code.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

/// The files that may hold unsafe code, beside the C ABI, which is made of pointers. A new name needs a reason in its
/// commit.
const UNSAFE: [&str; 21] = [
    "src/arena.rs",
    "src/cpu/gemm.rs",
    "src/cpu/gemm/bf16/avx512.rs",
    "src/cuda/cublaslt/descriptors.rs",
    "src/cuda/driver.rs",
    "src/cuda/mod.rs",
    "src/cuda/nvidia.rs",
    "src/cuda/nvidia/copies.rs",
    "src/cuda/nvidia/graph.rs",
    "src/cuda/nvidia/handles.rs",
    "src/cuda/nvidia/kernels.rs",
    "src/cuda/nvidia/outbox.rs",
    "src/cuda/nvidia/tests/buffers.rs",
    "src/cuda/probe.rs",
    "src/cuda/probe/cublaslt.rs",
    "src/cuda/simt.rs",
    "src/cuda/slices.rs",
    "src/data/shard/read.rs",
    "src/device/buffer.rs",
    "src/tensor.rs",
    "examples/03_borrow_a_stream.rs",
];
/// Longest source file. Longer ones are split by direction or by stage, never into `utils`.
const MOST_LINES: usize = 650;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Files below `folder` with this extension, relative to the root, sorted.
fn files(folder: &str, extension: &str) -> Vec<String> {
    fn walk(folder: &Path, extension: &str, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                walk(&entry, extension, found);
            } else if entry.extension().is_some_and(|e| e == extension) {
                found.push(entry);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root().join(folder), extension, &mut found);
    let relative = |path: PathBuf| path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
    let mut found: Vec<_> = found.into_iter().map(relative).collect();
    found.sort();
    assert!(!found.is_empty(), "no .{extension} in {folder}");
    found
}

fn rust_files() -> Vec<String> {
    ["src", "tests", "benches", "examples", "capi", "scalar"]
        .iter()
        .flat_map(|folder| files(folder, "rs"))
        .collect()
}

/// Lines with their numbers, comments left out.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    (1..).zip(text.lines().map(|line| line.split("//").next().unwrap()))
}

/// The ops, by the files that hold them.
fn ops() -> Vec<String> {
    let stem = |path: String| path.strip_prefix("src/ops/")?.strip_suffix(".rs").map(str::to_owned);
    let ops: Vec<_> = files("src/ops", "rs").into_iter().filter_map(stem).collect();
    // What is below an op's folder is part of the op.
    ops.into_iter().filter(|op| op != "mod" && op != "cost" && !op.contains('/')).collect()
}

#[test]
fn every_op_has_a_row_a_cost_tests_and_benches() {
    let table = read("src/ops/mod.rs");
    let readme = read("README.md");
    let backend = read("docs/backend.md");
    let mains = ["tests/ops/main.rs", "benches/ops/mod.rs"].map(|main| (main, read(main)));
    let costs = read("src/ops/cost.rs");
    for op in ops() {
        assert!(table.contains(&format!("//! | [`{op}`] |")), "{op} has no row in src/ops/mod.rs");
        assert!(table.contains(&format!("pub mod {op};")), "{op} is no module of src/ops/mod.rs");
        assert!(readme.contains(&format!("| `{op}` |")), "{op} has no row in README.md");
        assert!(backend.contains(&format!("| `{op}` |")), "{op} has no row in docs/backend.md");
        assert!(costs.contains(&format!("pub fn {op}_")), "{op} has no cost in src/ops/cost.rs");
        for (main, text) in &mains {
            let stem = main.replace("main", &op).replace("mod", &op);
            assert!(root().join(&stem).is_file(), "{op} has no {stem}");
            assert!(text.contains(&format!("mod {op};")), "{main} leaves out {op}");
        }
    }
    let rows = table.lines().filter(|line| line.starts_with("//! | [`")).count();
    assert_eq!(rows, ops().len(), "src/ops/mod.rs has a row without an op");
}

#[test]
fn every_file_of_kernels_has_its_op_and_its_tests() {
    let main = read("tests/kernels/main.rs");
    for path in files("kernels", "cu") {
        // `x.cu`, or `x_backward.cu` where one file would be too long.
        let stem = path.trim_start_matches("kernels/").trim_end_matches(".cu");
        let is_of = |op: &String| stem == op || stem.starts_with(&format!("{op}_"));
        let op = ops().into_iter().filter(is_of).max_by_key(String::len);
        let op = op.unwrap_or_else(|| panic!("{path} is named after no file of src/ops"));
        let tests = format!("tests/kernels/{op}.rs");
        assert!(root().join(&tests).is_file(), "{path} has no {tests}");
        assert!(main.contains(&format!("mod {op};")), "tests/kernels/main.rs leaves out {op}");
    }
}

#[test]
fn kernels_reach_memory_and_ptx_through_the_common_headers() {
    // The executor runs and checks what goes through them, and nothing else.
    let sources = ["cu", "cuh"].map(|extension| files("kernels", extension));
    for path in sources.iter().flatten().filter(|path| !path.starts_with("kernels/common/")) {
        for (number, line) in code(&read(path)) {
            let mut words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
            let own = words.find(|word| ["asm", "__asm__", "__shared__"].contains(word));
            assert!(own.is_none(), "{path}:{number} has {} of its own: {line}", own.unwrap());
        }
    }
}

#[test]
fn unsafe_code_is_where_it_may_be_and_nowhere_else() {
    let is_unsafe = |path: &String| {
        code(&read(path))
            .flat_map(|(_, line)| line.split(|c: char| !c.is_alphanumeric() && c != '_'))
            .any(|word| word == "unsafe")
    };
    let found: Vec<_> = rust_files()
        .into_iter()
        .filter(|path| !["tests/", "capi/"].iter().any(|folder| path.starts_with(folder)))
        .filter(is_unsafe)
        .collect();
    assert_eq!(found, UNSAFE);
}

#[test]
fn no_source_file_is_longer_than_a_reader_bears() {
    for path in rust_files() {
        let lines = read(&path).lines().count();
        assert!(lines <= MOST_LINES, "{path} has {lines} lines, may have {MOST_LINES}");
    }
}

#[test]
fn nothing_is_left_for_later() {
    for path in [files("src", "rs"), files("capi", "rs")].concat() {
        for (number, line) in (1..).zip(read(&path).lines()) {
            for word in ["TODO", "FIXME", "XXX", "HACK", "todo!", "unimplemented!", "dbg!"] {
                assert!(!line.contains(word), "{path}:{number} says {word}: {line}");
            }
        }
    }
}

/// Whether a line of code goes through `module`, as in `crate::model` or `model::Mae`.
fn names(line: &str, module: &str) -> bool {
    line.match_indices(module).any(|(at, _)| {
        let (before, after) = (&line[..at], &line[at + module.len()..]);
        let whole = !before.ends_with(|c: char| c.is_alphanumeric() || c == '_');
        whole
            && !before.ends_with("std::")
            && (after.starts_with("::") || before.ends_with("crate::"))
    })
}

/// No file of `from` may name any module of `above`.
fn assert_below(from: &[String], above: &[&str]) {
    for path in from {
        for (number, line) in code(&read(path)) {
            for module in above {
                assert!(!names(line, module), "{path}:{number} looks up at {module}: {line}");
            }
        }
    }
}

#[test]
fn reading_goes_down_only() {
    let ground = ["device", "dtype", "error", "tensor"].map(|m| format!("src/{m}.rs"));
    assert_below(&ground, &["ops", "model", "candle", "data", "train"]);
    assert_below(&files("src/cpu", "rs"), &["ops", "model", "candle", "data", "train"]);
    assert_below(&files("src/ops", "rs"), &["model", "candle", "data", "train"]);
    assert_below(&files("src/model", "rs"), &["candle", "data", "train"]);
    assert_below(&["src/candle.rs".into()], &["model", "data", "train"]);
    assert_below(&files("src/data", "rs"), &["model", "train::run", "train::step"]);
}

#[test]
fn ops_do_not_print_or_read_files_or_the_clock() {
    for path in files("src/ops", "rs") {
        for (number, line) in code(&read(&path)) {
            for word in
                ["println!", "print!", "std::fs", "std::io", "Instant", "SystemTime", "std::env"]
            {
                assert!(!line.contains(word), "{path}:{number} uses {word}: {line}");
            }
        }
    }
}

#[test]
fn every_op_opens_its_span() {
    // So that no profile leaves out its time.
    let drawing = read("src/train/timing/drawing.rs");
    for op in ops() {
        assert!(drawing.contains(&format!("(\"{op}\", \"#")), "{op} has no colour in a timeline");
        let source = read(format!("src/ops/{op}.rs"));
        for body in source.split("\npub fn ").skip(1) {
            let body = body.split("\n}").next().unwrap();
            let Some((name, body)) = body.split_once("(dev: &Device, args:") else { continue };
            // However the formatter has broken its lines.
            let body = body.split_whitespace().collect::<Vec<_>>().join(" ");
            let body = body.replace("dev .span", "dev.span").replace("span( ", "span(");
            let span = format!("let _span = dev.span(\"{op}::{name}\", ");
            let check = body.find("check(dev)?").or_else(|| body.find(".expect(")).unwrap();
            let at = body.find(&span).unwrap_or_else(|| panic!("{op}::{name} opens no span"));
            let work = body.find("match dev {").unwrap();
            assert!(check < at && at < work, "{op}::{name}: the span is of what follows the check");
        }
    }
}

#[test]
fn every_op_is_exported_to_c() {
    let header = read("capi/include/pixmim.h");
    for op in ops() {
        let source = read(format!("src/ops/{op}.rs"));
        let functions = source.lines().filter_map(|line| line.strip_prefix("pub fn "));
        let functions = functions.filter_map(|line| line.split_once("(dev: &Device, args:"));
        let names: Vec<_> = functions.map(|(name, _)| name).collect();
        assert!(!names.is_empty(), "src/ops/{op}.rs has no function of an op");
        for name in names {
            assert!(header.contains(&format!(" pixmim_{op}_{name}(")), "no pixmim_{op}_{name}");
        }
    }
}

#[test]
fn the_changelog_has_this_version() {
    let heading = format!("## [{}]", env!("CARGO_PKG_VERSION"));
    let changelog = read("CHANGELOG.md");
    assert!(changelog.lines().any(|line| line.starts_with(&heading)), "CHANGELOG.md: no {heading}");
}

#[test]
fn the_gate_runs_the_commands_that_the_readme_shows_first() {
    let readme = read("README.md");
    let (_, rest) = readme.split_once("```sh\n").unwrap();
    let (commands, _) = rest.split_once("```").unwrap();
    let gate = read(".ci/run");
    assert_eq!(commands.lines().count(), 2, "README.md starts with two commands");
    for command in commands.lines().chain(["cargo bench"]) {
        let command = command.split(" #").next().unwrap().trim_end();
        assert!(gate.contains(command), ".ci/run does not run `{command}`");
    }
}

#[test]
fn links_in_documents_lead_somewhere() {
    let mut documents = files("docs", "md");
    documents
        .extend(["README", "ARCHITECTURE", "CONTRIBUTING", "CHANGELOG"].map(|n| format!("{n}.md")));
    for path in documents {
        let text = read(&path);
        let folder = root().join(&path).parent().unwrap().to_owned();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = link.split('#').next().unwrap();
            if !file.is_empty() && !file.contains("://") {
                assert!(folder.join(file).exists(), "{path} links to {file}, which is not there");
            }
        }
    }
}
