//! A run that was interrupted goes on as if nothing had happened.

use std::fs;

use pixmim::train::checkpoint::{Checkpoint, TensorFile};
use pixmim::train::config::Auto;
use pixmim::train::metrics::{self, Notice, NoticeKind};
use pixmim::train::run::{Options, Resume};
use tempfile::tempdir;

use crate::{
    Said, assert_same_run, checkpoint, files, go_on, metrics_of, photos, tensors, tiny, train,
    train_anew,
};

#[test]
fn a_run_stopped_after_any_step_ends_as_one_that_was_not() {
    let (data, runs) = (photos(21), tempdir().unwrap());
    let whole = runs.path().join("whole");
    train_anew(&tiny(data.path(), &whole));
    for stop_after in 0..10 {
        let out = runs.path().join(stop_after.to_string());
        let mut config = tiny(data.path(), &out);
        let options = Options::default();
        let first = train(&config, &options, Some(stop_after), &mut Said::default()).unwrap();
        assert!(first.interrupted);
        assert_eq!(first.steps, stop_after);
        assert!(checkpoint(&out, stop_after).is_dir());
        // The other half runs on other threads.
        config.runtime.threads = Auto::Value(3);
        config.data.threads = Auto::Value(2);
        let summary = go_on(&config, None);
        assert_eq!((summary.steps, summary.interrupted), (10, false));
        assert_same_run(&format!("stopped after {stop_after}"), &whole, &out, 10);
        let kinds: Vec<_> =
            metrics::read::<Notice>(&out).unwrap().into_iter().map(|n| (n.step, n.kind)).collect();
        let expected =
            [NoticeKind::Interrupted, NoticeKind::Resumed].map(|kind| (stop_after, kind));
        assert_eq!(kinds, expected);
    }
}

#[test]
fn a_run_stopped_after_every_step_ends_as_one_that_was_not() {
    let (data, runs) = (photos(21), tempdir().unwrap());
    let (whole, out) = (runs.path().join("whole"), runs.path().join("steps"));
    train_anew(&tiny(data.path(), &whole));
    let config = tiny(data.path(), &out);
    for step in 1..10 {
        let summary = go_on(&config, Some(step));
        assert_eq!((summary.steps, summary.interrupted), (step, true));
    }
    go_on(&config, None);
    assert_same_run("stopped after every step", &whole, &out, 10);
}

#[test]
fn a_finished_run_that_goes_on_stays_as_it_is() {
    let (data, runs) = (photos(12), tempdir().unwrap());
    let out = runs.path().join("run");
    let config = tiny(data.path(), &out);
    let first = train_anew(&config);
    let before = (tensors(&out, 10), metrics_of(&out), files(&out.join("viz")));
    let again = go_on(&config, None);
    assert_eq!((again.steps, again.interrupted), (10, false));
    assert_eq!(again.loss, first.loss);
    assert_eq!(again.images_per_s, 0.0);
    assert!(before == (tensors(&out, 10), metrics_of(&out), files(&out.join("viz"))));
}

/// A checkpoint of the middle of a run, not its newest: what came after is forgotten.
#[test]
fn a_run_can_be_wound_back_to_a_checkpoint_of_its_own() {
    let (data, runs) = (photos(21), tempdir().unwrap());
    let (whole, out) = (runs.path().join("whole"), runs.path().join("run"));
    let mut config = tiny(data.path(), &whole);
    config.log.checkpoint_every = 3;
    config.log.keep_last = 9;
    train_anew(&config);
    config.log.out = out.clone();
    train_anew(&config);
    let options = Options { resume: Resume::From(checkpoint(&out, 6)), ..Options::default() };
    let summary = train(&config, &options, Some(7), &mut Said::default()).unwrap();
    assert_eq!((summary.steps, summary.interrupted), (7, true));
    assert_eq!(metrics_of(&out).len(), 7, "later steps are cut off");
    go_on(&config, None);
    let again = fs::read_dir(out.join("ckpt")).unwrap();
    let again =
        again.map(|entry| entry.unwrap().path()).find(|path| path.ends_with("step-00000010.2"));
    let path = again.expect("the last step was saved a second time");
    fs::remove_dir_all(checkpoint(&out, 10)).ok();
    fs::rename(path, checkpoint(&out, 10)).unwrap();
    assert_same_run("wound back", &whole, &out, 10);
}

#[test]
fn a_checkpoint_of_another_run_starts_a_new_one() {
    let (data, runs) = (photos(21), tempdir().unwrap());
    let (whole, out) = (runs.path().join("whole"), runs.path().join("copy"));
    let mut config = tiny(data.path(), &whole);
    config.log.checkpoint_every = 4;
    train_anew(&config);
    let from = checkpoint(&whole, 8);
    assert!(from.is_dir());
    let options = Options { resume: Resume::From(from), ..Options::default() };
    config.log.out = out.clone();
    let summary = train(&config, &options, None, &mut Said::default()).unwrap();
    assert_eq!(summary.steps, 10);
    assert!(tensors(&whole, 10) == tensors(&out, 10));
    assert_eq!(metrics_of(&out), metrics_of(&whole)[8..]);
}

#[test]
fn a_checkpoint_has_the_names_shapes_and_words_of_the_run() {
    let (data, runs) = (photos(12), tempdir().unwrap());
    let out = runs.path().join("run");
    train_anew(&tiny(data.path(), &out));
    let found = Checkpoint::open(&checkpoint(&out, 10)).unwrap();
    let state = &found.state;
    assert_eq!((state.step, state.samples, state.skipped, state.steps_per_epoch), (10, 80, 0, 1));
    for (key, value) in [
        ("norm_pix", "true"),
        ("target", "low_freq"),
        ("crop", "simple"),
        ("patch", "4"),
        ("image", "16"),
        ("heads", "3"),
        ("decoder_heads", "2"),
        ("mean", "0.485,0.456,0.406"),
        ("format", "pt"),
    ] {
        assert_eq!(found.metadata().get(key).map(String::as_str), Some(value), "{key}");
    }
    let model = TensorFile::open(&checkpoint(&out, 10).join("model.safetensors")).unwrap();
    for (name, shape) in [
        ("cls_token", &[1, 1, 24][..]),
        ("mask_token", &[1, 1, 16]),
        ("pos_embed", &[1, 17, 24]),
        ("decoder_pos_embed", &[1, 17, 16]),
        ("patch_embed.proj.weight", &[24, 3, 4, 4]),
        ("blocks.1.attn.qkv.weight", &[72, 24]),
        ("decoder_blocks.0.mlp.fc2.bias", &[16]),
        ("decoder_pred.weight", &[48, 16]),
    ] {
        assert_eq!(model.shape(name), Some(shape), "{name}");
    }
}
