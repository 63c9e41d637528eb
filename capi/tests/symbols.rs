//! What libpixmim shows to a linker: the functions of the header and nothing else; what it asks of one: the C library and that
//! of the compiler.

#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use common::{library, root, run, tool};

/// What `nm` lists, each line without its address: a letter, a name.
fn symbols(options: &[&str], file: &Path) -> Vec<(char, String)> {
    let listed = run(tool("NM", "nm").args(options).arg(file));
    let line = |line: &str| {
        let mut words = line.split_whitespace().rev();
        let (name, letter) = (words.next()?, words.next()?);
        (letter.len() == 1).then(|| (letter.chars().next().unwrap(), name.to_owned()))
    };
    listed.lines().filter_map(line).collect()
}

fn defined(file: &Path, options: &[&str]) -> BTreeSet<String> {
    symbols(options, file).into_iter().map(|(_, name)| name).collect()
}

/// The names on record, which only grow within a major version.
fn on_record() -> BTreeSet<String> {
    let path = root().join("capi/symbols.txt");
    fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn the_header_declares_the_symbols_on_record() {
    let header = fs::read_to_string(root().join("capi/include/pixmim.h")).unwrap();
    let code = header.lines().filter(|line| !line.trim_start().starts_with("//"));
    let declared = code.filter_map(|line| {
        let (before, _) = line.split_once('(')?;
        let name = before.rsplit([' ', '*']).next()?;
        name.starts_with("pixmim_").then(|| name.to_owned())
    });
    let declared: BTreeSet<_> = declared.collect();
    if std::env::var_os("PIXMIM_BLESS").is_some() {
        let lines: String = declared.iter().flat_map(|name| [name, "\n"]).collect();
        fs::write(root().join("capi/symbols.txt"), lines).unwrap();
    }
    assert_eq!(
        declared,
        on_record(),
        "capi/symbols.txt is old: PIXMIM_BLESS=1 cargo test --release -p pixmim-capi --test symbols"
    );
}

#[test]
fn the_shared_library_exports_the_symbols_on_record_alone() {
    let so = library().join("libpixmim.so");
    assert_eq!(defined(&so, &["--dynamic", "--defined-only"]), on_record());
}

#[test]
fn the_static_library_has_the_symbols_on_record() {
    let archive = library().join("libpixmim.a");
    let ours = |name: &String| name.starts_with("pixmim_");
    let found = defined(&archive, &["--extern-only", "--defined-only"]).into_iter().filter(ours);
    assert_eq!(found.collect::<BTreeSet<_>>(), on_record());
}

#[test]
fn the_shared_library_needs_the_c_library_alone() {
    let so = library().join("libpixmim.so");
    let dynamic = run(tool("READELF", "readelf").args(["--dynamic", "--wide"]).arg(&so));
    let named = |tag: &str| -> Vec<&str> {
        let of = dynamic.lines().filter(|line| line.contains(&format!("({tag})")));
        of.map(|line| line.split(['[', ']']).nth(1).unwrap()).collect()
    };
    assert_eq!(named("SONAME"), ["libpixmim.so.1"]);
    for needed in named("NEEDED") {
        let stem = needed.split(".so").next().unwrap();
        let known = [
            "libc",
            "libm",
            "libgcc_s",
            "libdl",
            "libpthread",
            "ld-linux-x86-64",
            "ld-linux-aarch64",
        ];
        assert!(known.contains(&stem), "libpixmim needs {needed}");
    }
    let asked = symbols(&["--dynamic", "--undefined-only"], &so);
    assert!(asked.len() > 50, "{asked:?}");
    for (letter, name) in asked {
        // A weak one (w) may be missing; else it has the version of the library that has it.
        let known = name.contains("@GLIBC_") || name.contains("@GCC_");
        assert!(letter == 'w' || known, "libpixmim needs {name}, which is in no C library");
    }
}
