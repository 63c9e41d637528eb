//! What a run may write over, and what it must leave alone.

use std::fs;
use std::path::Path;

use pixmim::train::config::Config;
use pixmim::train::run::{Options, Resume};
use tempfile::tempdir;

use crate::{Said, checkpoint, files, go_on, photos, tensors, tiny, train, train_anew};

/// Relative path and bytes of every file below a folder.
fn tree(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            found.extend(
                tree(&path).into_iter().map(|(below, data)| (format!("{name}/{below}"), data)),
            );
        } else {
            found.push((name, fs::read(&path).unwrap()));
        }
    }
    found.sort();
    found
}

/// Why a run is refused; nothing in its folder may change.
fn refusal(config: &Config, options: &Options, code: u8) -> String {
    let before = tree(&config.log.out);
    let error = train(config, options, None, &mut Said::default()).unwrap_err();
    assert_eq!(error.exit_code(), code, "{error}");
    assert!(tree(&config.log.out) == before, "something was written: {error}");
    error.to_string()
}

fn resume() -> Options {
    Options { resume: Resume::Auto, ..Options::default() }
}

fn overwrite() -> Options {
    Options { overwrite: true, ..Options::default() }
}

#[test]
fn an_existing_run_is_not_touched_unless_it_is_to_be_replaced() {
    let (data, runs) = (photos(12), tempdir().unwrap());
    let out = runs.path().join("run");
    let mut config = tiny(data.path(), &out);
    config.log.checkpoint_every = 4;
    train_anew(&config);
    let old = tensors(&out, 10);
    let why = refusal(&config, &Options::default(), 1);
    assert!(why.contains("exists and is not empty") && why.contains("--overwrite"), "{why}");

    // What the run did not write stays; what it wrote goes, the later checkpoints too.
    fs::write(out.join("notes.txt"), "mine").unwrap();
    fs::create_dir(out.join("photos")).unwrap();
    fs::write(out.join("photos/a.txt"), "mine too").unwrap();
    config.schedule.steps = Some(5);
    config.runtime.seed = 9;
    train(&config, &overwrite(), None, &mut Said::default()).unwrap();
    assert_eq!(fs::read(out.join("notes.txt")).unwrap(), b"mine");
    assert_eq!(fs::read(out.join("photos/a.txt")).unwrap(), b"mine too");
    assert!(!checkpoint(&out, 8).exists() && !checkpoint(&out, 10).exists());
    assert!(old != tensors(&out, 5));
    let pictures: Vec<_> = files(&out.join("viz")).into_iter().map(|(name, _)| name).collect();
    assert_eq!(pictures, ["step-00000000.png", "step-00000004.png", "step-00000005.png"]);
    let events = tree(&out).into_iter().filter(|(name, _)| name.contains("tfevents")).count();
    assert_eq!(events, 1);
    assert_eq!(Config::load(&out.join("config.toml")).unwrap(), config);
}

#[test]
fn a_folder_that_is_no_run_is_neither_replaced_nor_gone_on_with() {
    let (data, runs) = (photos(12), tempdir().unwrap());
    let out = runs.path().join("precious");
    fs::create_dir_all(out.join("viz")).unwrap();
    fs::write(out.join("viz/thesis.tex"), "years of work").unwrap();
    let config = tiny(data.path(), &out);
    for options in [overwrite(), resume()] {
        let why = refusal(&config, &options, 1);
        assert!(why.contains("holds no config.toml") && why.contains("--out"), "{why}");
    }
}

#[test]
fn a_run_killed_before_its_first_file_was_whole_can_be_started_again() {
    let (data, runs) = (photos(12), tempdir().unwrap());
    for options in [Options::default(), resume()] {
        let out = tempfile::tempdir_in(runs.path()).unwrap().keep();
        fs::write(out.join("config.toml.tmp"), "[mod").unwrap();
        train(&tiny(data.path(), &out), &options, None, &mut Said::default()).unwrap();
        assert!(!out.join("config.toml.tmp").exists());
    }
}

#[test]
fn another_architecture_method_seed_or_data_does_not_go_on_and_nothing_is_written() {
    let (data, runs) = (photos(24), tempdir().unwrap());
    let config = tiny(data.path(), &runs.path().join("run"));
    train_anew(&config);
    let refused = |change: &dyn Fn(&mut Config)| {
        let mut other = config.clone();
        change(&mut other);
        refusal(&other, &resume(), 1)
    };
    let why = refused(&|config| config.model.dim = 12);
    assert!(
        why.contains("step-00000010")
            && why.contains("`patch_embed.proj.weight` is F32 [24, 3, 4, 4]"),
        "{why}"
    );
    let why = refused(&|config| config.model.heads = 2);
    assert!(why.contains("another [model] or [method]"), "{why}");
    let why = refused(&|config| config.method.norm_pix = false);
    assert!(why.contains("another [model] or [method]"), "{why}");
    let why = refused(&|config| config.runtime.seed = 4);
    assert!(why.contains("was saved with seed 0; give --seed 0"), "{why}");
    let why = refused(&|config| config.optim.global_batch = 4);
    assert!(why.contains("3 steps in an epoch, now there are 6"), "{why}");
}

#[test]
fn a_damaged_checkpoint_is_passed_over_and_if_all_are_nothing_is_written() {
    let (data, runs) = (photos(24), tempdir().unwrap());
    let (whole, out) = (runs.path().join("whole"), runs.path().join("run"));
    train_anew(&tiny(data.path(), &whole));
    let mut config = tiny(data.path(), &out);
    config.log.checkpoint_every = 5;
    train(&config, &Options::default(), Some(8), &mut Said::default()).unwrap();

    let flip = |step: u64, file: &str| {
        let path = checkpoint(&out, step).join(file);
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(path, bytes).unwrap();
    };
    flip(8, "optim.safetensors");
    let mut said = Said::default();
    let summary = train(&config, &resume(), Some(6), &mut said).unwrap();
    assert_eq!(summary.steps, 6, "it went on after step 5");
    let [warning] = &said.warnings[..] else { panic!("{:?}", said.warnings) };
    let rejected = warning.contains("step-00000008 is rejected") && warning.contains("crc32c");
    assert!(rejected, "{warning}");
    go_on(&config, None);
    crate::assert_same_run("an older checkpoint", &whole, &out, 10);

    for step in [5, 6, 8, 10] {
        if checkpoint(&out, step).exists() {
            flip(step, "model.safetensors");
        }
    }
    let why = refusal(&config, &resume(), 5);
    assert!(why.contains("no checkpoint of it is sound"), "{why}");
    assert!(why.contains("step-00000010") && why.contains("--overwrite"), "{why}");
}

#[test]
fn a_run_of_which_no_step_was_saved_starts_anew() {
    let (data, runs) = (photos(24), tempdir().unwrap());
    let (whole, out) = (runs.path().join("whole"), runs.path().join("run"));
    train_anew(&tiny(data.path(), &whole));
    let config = tiny(data.path(), &out);
    train_anew(&config);
    fs::remove_dir_all(out.join("ckpt")).unwrap();
    go_on(&config, None);
    crate::assert_same_run("started anew", &whole, &out, 10);
}

#[test]
fn a_dry_run_writes_nothing() {
    let (data, runs) = (photos(12), tempdir().unwrap());
    let out = runs.path().join("run");
    let options = Options { dry_run: true, ..Options::default() };
    let mut config = tiny(data.path(), &out);
    config.schedule.steps = Some(1000);
    let summary = train(&config, &options, None, &mut Said::default()).unwrap();
    assert_eq!((summary.steps, summary.report), (20, None));
    assert!(summary.images_per_s > 0.0 && summary.tflop_per_s > 0.0 && summary.mfu > 0.0);
    assert!(!out.exists());
}
