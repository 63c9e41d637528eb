//! Steps that cannot be taken: skipped without a trace in the weights, told, dumped, and ended if they go on.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use pixmim::train::StepRecord;
use pixmim::train::checkpoint::{Checkpoint, State};
use pixmim::train::config::Config;
use pixmim::train::metrics::{self, Notice, NoticeKind};
use pixmim::train::run::{Options, Resume};
use pixmim::train::step::Trainer;
use pixmim::{DType, Device, Error};
use tempfile::tempdir;

use crate::accumulation::{batches, settings};
use crate::{Said, checkpoint, go_on, photos, tensors, tiny, train};

/// Bits of all weights and moments.
fn bits(trainer: &Trainer) -> Vec<u32> {
    let lists = [&trainer.mae.weights, &trainer.exp_avg, &trainer.exp_avg_sq];
    lists.iter().flat_map(|list| list.flat().as_slice::<f32>()).map(|x| x.to_bits()).collect()
}

fn set(trainer: &mut Trainer, name: &str, element: usize, value: f32) -> f32 {
    let index = trainer.mae.table().specs().iter().position(|spec| spec.name == name).unwrap();
    let [tensor] = trainer.mae.weights.views_mut([index]);
    std::mem::replace(&mut tensor.into_slice::<f32>()[element], value)
}

#[test]
fn a_step_that_is_not_finite_leaves_every_bit_and_the_next_one_goes_on() {
    let data = photos(24);
    let batches = batches(data.path(), 4, 3);
    let trainer = || {
        let config = tiny(data.path(), data.path()).model;
        Trainer::new(Device::cpu(), config, DType::F32, settings(4)).unwrap()
    };
    let step = |trainer: &mut Trainer, step: usize| {
        trainer.clear().unwrap();
        for batch in &batches[2 * step..2 * step + 2] {
            trainer.accumulate_batch(batch, 2).unwrap();
        }
        trainer.update(1e-2).unwrap()
    };
    let mut undisturbed = trainer();
    let losses = [0, 2].map(|i| step(&mut undisturbed, i).loss);
    for (name, value) in [
        ("patch_embed.proj.weight", f32::NAN),
        ("decoder_blocks.0.mlp.fc1.weight", f32::INFINITY),
        ("blocks.0.norm1.bias", f32::NEG_INFINITY),
        // Only the loss overflows; only the square of the gradient does.
        ("decoder_pred.bias", 2e19),
        ("decoder_norm.weight", 1e19),
    ] {
        let mut trainer = trainer();
        assert!(step(&mut trainer, 0).updated);
        let before = set(&mut trainer, name, 7, value);
        let poisoned = bits(&trainer);
        let outcome = step(&mut trainer, 1);
        assert!(!outcome.updated, "{name} {value}: {outcome:?}");
        let overflows = [outcome.loss, outcome.grad_norm, outcome.grad_norm * outcome.grad_norm]
            .map(|x| x.is_nan() || x.abs() > f64::from(f32::MAX));
        let expected = match name {
            "decoder_pred.bias" => [true, false, false],
            "decoder_norm.weight" => [false, false, true],
            _ => [true; 3],
        };
        assert_eq!(overflows, expected, "{name} {value}: {outcome:?}");
        assert!(bits(&trainer) == poisoned, "{name} {value}: something changed");
        assert_eq!(trainer.updates().unwrap(), 1);

        set(&mut trainer, name, 7, before);
        let outcome = step(&mut trainer, 2);
        assert!(outcome.updated);
        assert_eq!(outcome.loss, losses[1], "{name} {value}");
        assert!(bits(&trainer) == bits(&undisturbed), "{name} {value}: a trace is left");
    }
}

/// A weight decay of 0.5 at a learning rate of 10 multiplies matrices by -4 in each step.
fn diverging(data: &Path, out: &Path) -> Config {
    let mut config = tiny(data, out);
    config.optim.lr = Some(10.0);
    config.optim.weight_decay = 0.5;
    config.optim.max_skipped = 6;
    config.schedule.steps = Some(200);
    config.schedule.warmup = "0it".into();
    config.log.checkpoint_every = 1;
    config.log.keep_last = 1000;
    config
}

#[test]
fn a_run_that_diverges_is_ended_with_advice_and_sound_checkpoints() {
    let (data, runs) = (photos(24), tempdir().unwrap());
    let out = runs.path().join("run");
    let config = diverging(data.path(), &out);
    let mut said = Said::default();
    let error = train(&config, &Options::default(), None, &mut said).unwrap_err();
    assert_eq!(error.exit_code(), 3, "{error}");
    assert!(matches!(error, Error::Diverged { .. }), "{error}");
    let text = error.to_string();
    for advice in ["6 steps in a row", "lower the learning rate", "schedule.warmup", "clip_grad"] {
        assert!(text.contains(advice), "{text}");
    }

    let records = metrics::read::<StepRecord>(&out).unwrap();
    let skipped: Vec<u64> = records.iter().filter(|r| r.loss.is_nan()).map(|r| r.step).collect();
    let last = *skipped.last().unwrap();
    assert!(text.contains(&format!("diverged at step {last}:")), "{text}");
    assert!(skipped.ends_with(&Vec::from_iter(last - 5..=last)), "{skipped:?}");
    assert!(!skipped.contains(&1), "the first step is sound");

    // Every step that was not taken was told, kept for the report, and dumped.
    let notices = metrics::read::<Notice>(&out).unwrap();
    let told: Vec<_> =
        notices.iter().filter(|n| n.kind == NoticeKind::Skipped).map(|n| n.step).collect();
    assert_eq!(told, skipped);
    assert_eq!(fs::read_dir(out.join("dump")).unwrap().count(), skipped.len());
    for step in &skipped {
        let name = format!("step-{step:08}.json");
        let warning = format!("step {step} was skipped");
        let warned = |text: &&String| text.contains(&warning) && text.contains(&name);
        assert_eq!(said.warnings.iter().filter(warned).count(), 1, "{:?}", said.warnings);
        let dump = fs::read(out.join("dump").join(name)).unwrap();
        let dump: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&dump).unwrap();
        assert_eq!(dump["step"], *step);
        assert_eq!(dump["samples"].as_array().unwrap().len(), 8);
        assert_eq!(dump["grad_norms"].as_object().unwrap().len(), 48);
        let number = |key: &str| dump[key].as_str().unwrap().parse::<f64>().unwrap();
        // The square of the gradient is what overflows first.
        assert!(!(number("loss").is_finite() && number("grad_norm") < 1.8e19), "{dump:?}");
    }
    let report = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(report.contains("training diverged at step"), "the report says how it ended");

    // No checkpoint of the end was written; those before it are sound, and a skipped step is the one before it.
    assert!(!checkpoint(&out, last).exists());
    for step in 1..last {
        let state: State = Checkpoint::open(&checkpoint(&out, step)).unwrap().state;
        assert_eq!(state.step, step);
        assert_eq!(state.skipped, skipped.iter().filter(|&&s| s <= step).count() as u64);
        assert!(state.smoothed_loss.is_finite());
        let [model, optim] = tensors(&out, step);
        if skipped.contains(&step) {
            let [model_before, optim_before] = tensors(&out, step - 1);
            assert!(model == model_before && optim == optim_before, "step {step} left a trace");
        }
        let header = |bytes: &[u8]| u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for bytes in [&model, &optim] {
            let numbers = bytes[8 + header(bytes)..].chunks_exact(4);
            let mut numbers = numbers.map(|b| f32::from_le_bytes(b.try_into().unwrap()));
            assert!(numbers.all(f32::is_finite));
        }
    }
}

/// Skipped steps are counted, in all and in a row, across interruptions.
#[test]
fn a_run_that_diverges_does_so_alike_when_it_is_interrupted() {
    let (data, runs) = (photos(24), tempdir().unwrap());
    let end = |name: &str, interrupted: bool| {
        let config = diverging(data.path(), &runs.path().join(name));
        let options = Options { resume: Resume::Auto, ..Options::default() };
        let error = (1..)
            .map(|step| interrupted.then_some(step))
            .find_map(|stop| train(&config, &options, stop, &mut Said::default()).err())
            .unwrap();
        let Error::Diverged { step: last, .. } = error else { panic!("{error}") };
        let path = checkpoint(&config.log.out, last - 1);
        let state = fs::read_to_string(path.join("state.toml")).unwrap();
        (error.to_string(), state, tensors(&config.log.out, last - 1))
    };
    let [whole, parts] = [("whole", false), ("parts", true)].map(|(name, cut)| end(name, cut));
    assert!(whole == parts, "{} {}, {} {}", whole.0, whole.1, parts.0, parts.1);
}

/// Adam's bias correction counts updates, not steps: a checkpoint that says that two of its steps were skipped gives
/// other weights than one that says that none was, with the same moments.
#[test]
fn a_run_that_goes_on_counts_the_updates_that_were_made() {
    let (data, runs) = (photos(24), tempdir().unwrap());
    let [none, two] = [0, 2].map(|skipped| {
        let out = runs.path().join(skipped.to_string());
        let config = tiny(data.path(), &out);
        train(&config, &Options::default(), Some(5), &mut Said::default()).unwrap();
        let file = |name: &str| checkpoint(&out, 5).join(name);
        let state = fs::read_to_string(file("state.toml")).unwrap();
        let other = state.replace("skipped = 0", &format!("skipped = {skipped}"));
        let manifest = fs::read_to_string(file("MANIFEST")).unwrap();
        let [crc, other_crc] =
            [&state, &other].map(|text| format!("{:08x}", crc32c::crc32c(text.as_bytes())));
        assert!(manifest.contains(&crc));
        fs::write(file("MANIFEST"), manifest.replace(&crc, &other_crc)).unwrap();
        fs::write(file("state.toml"), other).unwrap();
        go_on(&config, Some(6));
        tensors(&out, 6)
    });
    assert!(none[0] != two[0], "the same weights");
    assert!(none[1] == two[1], "other moments");
}
