//! `examples/c/train.c`, built against an installed libpixmim as its users build it; and the C that documents show.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{root, run, target, tool};

const WARNINGS: [&str; 4] = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"];

/// The flags of a line of pixmim.pc, such as `Libs`.
fn flags(prefix: &Path, line: &str) -> Vec<String> {
    let text = fs::read_to_string(prefix.join("lib/pkgconfig/pixmim.pc")).unwrap();
    assert!(!text.contains('@'), "something is not filled in: {text}");
    let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    let flags = value(&format!("{line}: ")).split(' ');
    let [prefix, include, lib] = ["prefix=", "includedir=", "libdir="].map(value);
    let (include, lib) = (include.replace("${prefix}", prefix), lib.replace("${prefix}", prefix));
    flags.map(|flag| flag.replace("${includedir}", &include).replace("${libdir}", &lib)).collect()
}

/// Runs the program and judges what it says.
fn trains(program: &Path, folder: &Path) {
    let text = run(Command::new(program).arg("-1").arg(folder.join("weights.safetensors")));
    let losses: Vec<f64> = text
        .lines()
        .filter_map(|line| line.split("loss ").nth(1)?.split(' ').next()?.parse().ok())
        .collect();
    assert_eq!(losses.len(), 7, "{text}");
    assert!(losses[6] < 0.8 * losses[0], "the loss did not fall: {text}");
    let (saved, loaded) = text.lines().last().unwrap().split_once(", loaded ").unwrap();
    assert_eq!(saved.strip_prefix("saved "), Some(loaded), "{text}");
}

#[test]
fn the_program_builds_as_c_and_as_cpp_against_both_libraries_and_trains() {
    let folder = tempfile::tempdir().unwrap();
    let prefix = folder.path().join("installed");
    let mut install = Command::new(root().join("scripts/install-capi"));
    run(install.arg(&prefix).env("CARGO_TARGET_DIR", target()));
    let source = root().join("examples/c/train.c");
    for (variable, usual, language, standard) in
        [("CC", "gcc", "c", "-std=c11"), ("CXX", "g++", "c++", "-std=c++17")]
    {
        let build = |kind: &str, libraries: &[String]| {
            let program = folder.path().join(format!("{language}-{kind}"));
            let mut compile = tool(variable, usual);
            compile.args([standard, "-O1"]).args(WARNINGS).args(flags(&prefix, "Cflags"));
            compile.args(["-x", language]).arg(&source).args(["-x", "none"]).args(libraries);
            run(compile.arg("-lm").arg("-o").arg(&program));
            program
        };
        let rpath = format!("-Wl,-rpath,{}", prefix.join("lib").display());
        let dynamic = build("dynamic", &[flags(&prefix, "Libs"), vec![rpath]].concat());
        trains(&dynamic, folder.path());
        let archive = prefix.join("lib/libpixmim.a").display().to_string();
        let archive = build("static", &[vec![archive], flags(&prefix, "Libs.private")].concat());
        trains(&archive, folder.path());
    }
}

#[test]
fn the_c_that_documents_show_compiles() {
    let document = fs::read_to_string(root().join("docs/backend.md")).unwrap();
    let code: Vec<_> =
        document.split("```c\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert!(!code.is_empty(), "docs/backend.md shows no C");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("shown.c");
    fs::write(&file, format!("#include <stdlib.h>\n#define my_alloc malloc\n{}", code.concat()))
        .unwrap();
    let mut compile = tool("CC", "gcc");
    compile
        .args(["-std=c11", "-fsyntax-only"])
        .args(WARNINGS)
        .arg("-I")
        .arg(root().join("capi/include"));
    run(compile.arg(&file));
}
