//! The program `pretrain_vit` as a process, as far as it goes without training.
#![cfg(feature = "train")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "example/program.rs"]
mod program;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use program::program;
use tempfile::TempDir;

/// The program in an empty folder, without config in its environment.
fn command(folder: &TempDir, arguments: &[&str]) -> Command {
    let mut command = Command::new(program());
    command.current_dir(folder.path()).args(arguments).stdin(Stdio::null());
    for (name, _) in
        std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PIXMIM_"))
    {
        command.env_remove(name);
    }
    command
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

/// Runs what must be refused as a mistake of the user; gives what was said, after `error[1]: `.
fn refusal(command: &mut Command, folder: &TempDir) -> String {
    let before = listing(folder.path());
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(stdout(&output), "", "{said}");
    assert_eq!(listing(folder.path()), before, "something was written: {said}");
    said.strip_prefix("error[1]: ").unwrap_or_else(|| panic!("{said}")).trim_end().to_owned()
}

fn refused(arguments: &[&str]) -> String {
    let folder = folder();
    refusal(&mut command(&folder, arguments), &folder)
}

fn listing(folder: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    entries
}

#[test]
fn help_lists_every_option() {
    let output = command(&folder(), &["--help"]).output().unwrap();
    assert!(output.status.success());
    let help = stdout(&output);
    for option in [
        "preset",
        "config",
        "set",
        "data",
        "method",
        "device",
        "out",
        "resume",
        "steps",
        "epochs",
        "seed",
        "dry-run",
        "overwrite",
        "explain",
        "help",
        "version",
    ] {
        let line = help.lines().find(|line| line.contains(&format!(" --{option}")));
        let line = line.unwrap_or_else(|| panic!("--{option} is not in the help"));
        assert!(line.len() > 30, "--{option} is not explained: {line}");
    }
    for word in [
        "demo",
        "tiny",
        "pixmim-vit-b-300e",
        "mae",
        "cuda",
        "doctor",
        "bench-data",
        "Examples:",
        "Exit codes",
    ] {
        assert!(help.contains(word), "{word}");
    }
}

#[test]
fn mistakes_in_options_are_sentences_with_exit_code_1() {
    for (arguments, expected) in [
        (&["--prest", "tiny"][..], "unexpected argument '--prest' found"),
        (&["--preset", "bse"], "a similar value exists: 'base'"),
        (&["--method", "beit"], "invalid value 'beit' for '--method"),
        (&["--device", "gpu"], "[possible values: auto, cpu, cuda, simt]"),
        (&["--steps", "1", "--epochs", "1"], "cannot be used with"),
        (&["--resume", "auto", "--overwrite"], "cannot be used with"),
        (&["photos"], "photos"),
        (
            &["--steps", "many"],
            "--steps: `schedule.steps` is \"many\", expected a whole number from 1",
        ),
        (&["--steps", "-5"], "--steps: `schedule.steps` is -5, expected"),
        (&["--steps", "0"], "--steps: `schedule.steps` is 0, expected"),
        (&["--epochs", "0"], "--epochs: `schedule.epochs` is 0, expected a number above 0"),
        (&["--epochs", "nan"], "--epochs: `schedule.epochs` is nan, expected"),
        (&["--seed", "-1"], "--seed: `runtime.seed` is -1, expected"),
        (&["--seed", "99999999999999999999"], "--seed: `runtime.seed` is \"99999999999999999999\""),
        (&["--set", "optim.globl_batch=3"], "did you mean `optim.global_batch`?"),
        (&["--set", "optim.lr"], "--set optim.lr: has no `=`"),
        (&["--set", "optim.lr=fast"], "`optim.lr` is \"fast\", expected a number above 0"),
        (&["--set", "optim.lr=1e-3", "--set", "optim.base_lr=1e-3"], "gives both"),
        (&["--set", "method.norm_pix=yes"], "`method.norm_pix` is \"yes\", expected true or false"),
        (&["--set", "method.crop=centre"], "expected \"simple\" or \"random_resized\""),
        (&["--set", "method.mask_ratio=1"], "expected a number above 0 below 1"),
        (&["--set", "method.mask_ratio=0.999"], "keeps none of 64 patches"),
        (&["--set", "method.radius=-1"], "expected a number above 0"),
        (&["--set", "data.std=[1, 1]"], "expected three numbers"),
        (&["--set", "optim.betas=[0.9, 1]"], "expected two numbers"),
        (&["--set", "schedule.warmup=40"], "expected epochs like \"40ep\""),
        (&["--set", "model.image_size=100"], "use 96 or 104"),
        (&["--set", "model.heads=7"], "does not divide model.dim 192; use 6 or 8"),
        (&["--set", "optim.micro_batch=48"], "does not divide optim.global_batch 64; use 32 or 64"),
        (&["--config", "none.toml"], "none.toml: no such file"),
        (
            &["--preset", "base"],
            "--data: not given, and preset base needs images; give --data FOLDER",
        ),
        (&["--resume", "none"], "--resume none: no such folder"),
        (&["--explain", "optim.lrr"], "did you mean `optim.lr`?"),
    ] {
        let why = refused(arguments);
        assert!(why.contains(expected), "{arguments:?}: {why}");
    }
}

#[test]
fn mistakes_in_a_config_file_name_line_and_column() {
    let folder = folder();
    let path = folder.path().join("my.toml");
    for (text, expected) in [
        ("[optim]\nlr = 1e-3\nmomentun = 0.9\n", "my.toml:3:1: unknown key `optim.momentun`"),
        ("[model]\ndim = [1]\n", "my.toml:2:1: `model.dim` is [1], expected a whole number"),
        ("[model]\n  dim = 190\n", "my.toml:2:3: `model.dim` is 190 and not divisible by 4"),
        ("[model\n", "my.toml:1:7: "),
    ] {
        std::fs::write(&path, text).unwrap();
        let why = refusal(&mut command(&folder, &["--config", "my.toml"]), &folder);
        assert!(why.starts_with(expected), "{why}");
    }
}

#[test]
fn mistakes_in_the_environment_name_the_variable() {
    let folder = folder();
    let mut command = command(&folder, &[]);
    let why = refusal(command.env("PIXMIM_OPTIM__LR", "-1"), &folder);
    assert!(why.starts_with("PIXMIM_OPTIM__LR: `optim.lr` is -1, expected"), "{why}");
}

#[test]
fn a_folder_that_is_no_run_is_not_resumed() {
    let folder = folder();
    std::fs::create_dir_all(folder.path().join("photos")).unwrap();
    let why = refusal(&mut command(&folder, &["--resume", "photos"]), &folder);
    assert!(
        why.contains("neither a run folder with its config.toml nor a checkpoint in one"),
        "{why}"
    );
}

#[test]
fn the_config_of_a_run_is_the_base_when_it_goes_on() {
    let folder = folder();
    let run = folder.path().join("runs/first");
    std::fs::create_dir_all(run.join("ckpt/step-00000001")).unwrap();
    let demo = pixmim::train::config::Config::preset("demo").unwrap().to_toml().unwrap();
    let odd = demo.replace("patch_size = 8", "patch_size = 5");
    std::fs::write(run.join("config.toml"), odd).unwrap();
    // 224 is a multiple of the demo's patches of 8, but not of this run's 5.
    for resume in [&["--resume"][..], &["--resume", "runs/first"], &["--resume", "auto"]] {
        let mut arguments = resume.to_vec();
        arguments.extend(["--set", "model.image_size=224"]);
        let why = refusal(&mut command(&folder, &arguments), &folder);
        assert!(why.contains("is 224 and not a multiple of model.patch_size 5"), "{why}");
    }
    let why =
        refusal(&mut command(&folder, &["--resume", "runs/first", "--out", "other"]), &folder);
    assert!(why.contains("is a run folder, and --out names another"), "{why}");
}

#[test]
fn doctor_ends_with_the_next_command_and_leaves_nothing() {
    let folder = folder();
    let output = command(&folder, &["doctor"]).output().unwrap();
    assert!(output.status.success());
    let said = stdout(&output);
    assert!(said.starts_with("pixmim 0."), "{said}");
    assert!(said.contains("64 images in "), "{said}");
    assert!(said.contains("training runs on the CPU"), "{said}");
    assert_eq!(said.lines().last(), Some("next: cargo run --release --example pretrain_vit"));
    assert_eq!(listing(folder.path()), Vec::<PathBuf>::new());

    std::fs::write(folder.path().join("runs"), "a file where the folder should be").unwrap();
    let output = command(&folder, &["doctor"]).output().unwrap();
    assert!(output.status.success());
    let last = stdout(&output).lines().last().unwrap();
    assert_eq!(last, "next: cargo run --release --example pretrain_vit -- --out FOLDER");
}

#[test]
fn bench_data_times_each_stage_and_leaves_nothing() {
    let folder = folder();
    for (method, stage) in [("pixmim", "resize the short side"), ("mae", "random resized crop")] {
        let arguments = ["bench-data", "--method", method, "--set", "data.threads=2"];
        let output = command(&folder, &arguments).output().unwrap();
        assert!(output.status.success());
        let said = stdout(&output);
        let rate = |name: &str| {
            let line = said.lines().find(|line| line.starts_with(name));
            let line = line.unwrap_or_else(|| panic!("{name} is not in {said}"));
            line.split_whitespace().next_back().unwrap().parse::<f64>().unwrap()
        };
        for name in ["read and decode, first time", "read and decode  ", stage, "loader  "] {
            assert!(rate(name) > 0.0, "{said}");
        }
        assert!(said.contains(" images/s with data.threads=2\n"), "{said}");
    }
    std::fs::create_dir(folder.path().join("broken")).unwrap();
    std::fs::write(folder.path().join("broken/a.jpg"), "no image").unwrap();
    let output = command(&folder, &["bench-data", "--data", "broken"]).output().unwrap();
    assert_eq!(output.status.code(), Some(4));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("a.jpg: not an image"), "{said}");
}

#[test]
fn explain_tells_about_a_key() {
    let output = command(&folder(), &["--explain", "method.radius"]).output().unwrap();
    assert!(output.status.success());
    let said = stdout(&output);
    assert!(said.starts_with("method.radius: radius of the low-pass filter"), "{said}");
    assert!(said.contains("  preset   base: \"auto\"\n"), "{said}");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    for arguments in [&["--help"][..], &["doctor"], &["--explain", "optim.lr"]] {
        let folder = folder();
        let mut child = command(&folder, arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert_eq!(String::from_utf8(output.stderr).unwrap(), "", "{arguments:?}");
    }
}
