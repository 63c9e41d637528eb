//! The kernels compiled for the host: one static library with the executor, every kernel and the list of kernels.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use crate::jobs::{self, Job};
use crate::sources::{self, Source};

/// Kernels that break the rules on purpose, for the executor's own tests.
const FAULTS: &str = "tests/executor/faults.cu";
const FLAGS: [&str; 10] = [
    "-std=c++17",
    "-O2",
    "-g1",
    "-ffp-contract=off",
    "-mavx2",
    "-mfma",
    "-mf16c",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
    "-Ikernels",
];

/// Whether the executor can be built for the target: its fibers and its arithmetic are written for x86-64 Linux.
pub(crate) fn is_supported() -> bool {
    let target = |key: &str| env::var(key).unwrap_or_default();
    target("CARGO_CFG_TARGET_ARCH") == "x86_64" && target("CARGO_CFG_TARGET_OS") == "linux"
}

/// Builds and links `libpixmim_simt.a` of the executor and `kernels`.
pub(crate) fn build(kernels: &[Source], out: &Path) -> Result<(), String> {
    let out = out.join("simt");
    fs::create_dir_all(&out).map_err(|error| format!("cannot make {}: {error}", out.display()))?;
    let mut cc = cc::Build::new();
    let cc = cc.cpp(true).opt_level(2).debug(false);
    let compiler = cc.try_get_compiler().map_err(|error| no_compiler(&error.to_string()))?;
    let version = Command::new(compiler.path()).arg("--version").output();
    let version =
        version.map_err(|e| no_compiler(&format!("{}: {e}", compiler.path().display())))?;

    let faults =
        Path::new(FAULTS).is_file().then(|| sources::read(Path::new(FAULTS))).transpose()?;
    let registry = out.join("registry.cpp");
    write_if_changed(&registry, &registry_of(kernels.iter().chain(&faults)))?;
    let mut units = sources::files("kernels/simt", "cpp")?;
    units.extend(kernels.iter().chain(&faults).map(|source| source.path.clone()));
    units.push(registry);

    let job = |unit: &PathBuf| -> Result<Job, String> {
        let file = unit.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let output = out.join(format!("{file}.o"));
        let mut inputs = sources::Fnv(sources::hash(unit, None)?);
        inputs.write(&version.stdout);
        let mut command = compiler.to_command();
        // After cc's own flags, so that these win. A path relative to the package is what messages then show.
        command.args(FLAGS).args(["-x", "c++", "-c"]).arg(unit).arg("-o").arg(&output);
        Ok(Job { name: unit.display().to_string(), output, inputs: inputs.0, command })
    };
    let jobs = units.iter().map(job).collect::<Result<Vec<_>, _>>()?;
    let objects: Vec<_> = jobs.iter().map(|job| job.output.clone()).collect();
    for warning in jobs::run(jobs)?.iter().flat_map(|said| said.lines()) {
        println!("cargo::warning={warning}");
    }
    cc.objects(objects).try_compile("pixmim_simt").map_err(|error| error.to_string())?;
    println!("cargo::rustc-link-lib=pthread");
    println!("cargo::rustc-cfg=pixmim_simt");
    if faults.is_some() {
        println!("cargo::rerun-if-changed={FAULTS}");
    }
    Ok(())
}

/// The list of kernels by which the executor finds one by name.
fn registry_of<'a>(sources: impl Iterator<Item = &'a Source>) -> String {
    let names: Vec<_> = sources.flat_map(|source| &source.kernels).map(|k| &k.name).collect();
    let declare = |name| format!("extern const simt::Kernel pixmim_kernel_{name};\n");
    let list = |name| format!("    &pixmim_kernel_{name},\n");
    format!(
        "#include \"simt/simt.h\"\nextern \"C\" {{\n{}\
         extern const simt::Kernel* const pixmim_simt_kernels[] = {{\n{}    nullptr}};\n}}\n",
        names.iter().map(declare).collect::<String>(),
        names.iter().map(list).collect::<String>(),
    )
}

fn write_if_changed(path: &Path, text: &str) -> Result<(), String> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    fs::write(path, text).map_err(|error| format!("cannot write {}: {error}", path.display()))
}

fn no_compiler(why: &str) -> String {
    format!(
        "the feature `simt` needs a C++17 compiler ({why}): install g++ or clang++, or name one in CXX"
    )
}
