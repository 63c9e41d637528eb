//! Checkpoints: what is saved is what is loaded, and nothing else is taken for it.
#![cfg(all(feature = "train", unix))]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use pixmim::rng::philox4x32_10;
use pixmim::train::checkpoint::{
    Checkpoint, Contents, NamedTensor, NamedTensorMut, Part, State, config_hash, newest, save,
};
use pixmim::{Error, Result};
use tempfile::TempDir;

const FILES: [&str; 5] =
    ["MANIFEST", "matmul-plans.bin", "model.safetensors", "optim.safetensors", "state.toml"];

type Shape = (&'static str, &'static [usize]);

const WEIGHTS: [Shape; 5] = [
    ("cls_token", &[1, 1, 7]),
    ("mask_token", &[1, 1, 5]),
    ("patch_embed.proj.weight", &[7, 3, 2, 2]),
    ("blocks.0.attn.qkv.weight", &[21, 7]),
    ("decoder_pred.bias", &[12]),
];
const FROZEN: [Shape; 2] = [("pos_embed", &[1, 5, 7]), ("decoder_pos_embed", &[1, 5, 5])];

/// Weights, frozen tensors, first and second moments: values that differ by step, group and tensor.
struct Values {
    step: u64,
    groups: [Vec<Vec<f32>>; 4],
}

const GROUPS: [&[Shape]; 4] = [&WEIGHTS, &FROZEN, &WEIGHTS, &WEIGHTS];

impl Values {
    fn new(step: u64) -> Self {
        let mut first = step as f32;
        let mut fill = |elems: usize| {
            first += 0.5;
            (0..elems).map(|i| first - i as f32 / 64.0).collect()
        };
        Self { step, groups: GROUPS.map(|shapes| elems(shapes).map(&mut fill).collect()) }
    }

    fn contents(&self) -> Contents<'_> {
        let metadata = [
            ("crop", "simple"),
            ("mean", "[0.485, 0.456, 0.406]"),
            ("norm_pix", "true"),
            ("note", "\"quotes\", \\ and\nlines: \u{e9}\u{1F4BE}"),
            ("patch", "2"),
            ("radius", "40"),
            ("std", "[0.229, 0.224, 0.225]"),
            ("target", "low_freq"),
        ];
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let state = State {
            step: self.step,
            samples: self.step * 64,
            seed: u64::MAX,
            skipped: 3,
            skipped_in_row: 2,
            steps_per_epoch: 781,
            smoothed_loss: 0.1 + 0.2,
            config_hash: config_hash("[model]\ndim = 7\n"),
            world_size: 1,
        };
        let [weights, frozen, exp_avg, exp_avg_sq] =
            [0, 1, 2, 3].map(|group| inputs(GROUPS[group], &self.groups[group]));
        let matmul_plans = (0..200).map(|i| (self.step + i) as u8).collect();
        Contents { weights, frozen, exp_avg, exp_avg_sq, metadata, state, matmul_plans }
    }

    fn save(&self, run: &Path, keep_last: usize) -> Result<PathBuf> {
        save(run, &self.contents(), keep_last)
    }

    fn assert_in(&self, checkpoint: &mut Checkpoint) {
        assert_eq!(checkpoint.state, self.contents().state);
        let [weights, frozen, exp_avg, exp_avg_sq] = &self.groups;
        let model = [weights.as_slice(), frozen].concat();
        for (part, shapes, group) in [
            (Part::Model, &[WEIGHTS.as_slice(), &FROZEN].concat(), &model),
            (Part::ExpAvg, &WEIGHTS.to_vec(), exp_avg),
            (Part::ExpAvgSq, &WEIGHTS.to_vec(), exp_avg_sq),
        ] {
            let mut data = poison(shapes);
            checkpoint.read(part, &mut outputs(shapes, &mut data)).unwrap();
            for ((shape, values), data) in shapes.iter().zip(group).zip(&data) {
                let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(data), bits(values), "{part:?} {shape:?}");
            }
        }
    }
}

fn elems(shapes: &[Shape]) -> impl Iterator<Item = usize> {
    shapes.iter().map(|(_, shape)| shape.iter().product())
}

fn poison(shapes: &[Shape]) -> Vec<Vec<f32>> {
    elems(shapes).map(|elems| vec![f32::NAN; elems]).collect()
}

fn inputs<'a>(shapes: &[Shape], data: &'a [Vec<f32>]) -> Vec<NamedTensor<'a>> {
    let tensor = |(shape, data): (&Shape, &'a Vec<f32>)| NamedTensor {
        name: shape.0,
        shape: shape.1.to_vec(),
        data,
    };
    shapes.iter().zip(data).map(tensor).collect()
}

fn outputs<'a>(shapes: &[Shape], data: &'a mut [Vec<f32>]) -> Vec<NamedTensorMut<'a>> {
    let tensor = |(shape, data): (&Shape, &'a mut Vec<f32>)| NamedTensorMut {
        name: shape.0,
        shape: shape.1.to_vec(),
        data,
    };
    shapes.iter().zip(data).map(tensor).collect()
}

/// Why `part` cannot be read into tensors of these shapes; nothing may have been copied.
fn refusal(checkpoint: &mut Checkpoint, part: Part, shapes: &[Shape]) -> String {
    let mut data = poison(shapes);
    let error = checkpoint.read(part, &mut outputs(shapes, &mut data)).unwrap_err();
    assert!(data.iter().flatten().all(|x| x.is_nan()), "copied before it was checked");
    assert_eq!(error.exit_code(), 1);
    error.to_string().replace(&checkpoint.path.display().to_string(), "")
}

fn names(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = names.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The steps in a run's folder; nothing else may be there but `LATEST`.
fn saved(run: &Path) -> Vec<String> {
    let mut names = names(&run.join("ckpt"));
    assert_eq!(names.remove(0), "LATEST");
    names
}

fn sound(run: &Path) -> Checkpoint {
    let (checkpoint, rejected) = newest(run).unwrap();
    assert!(rejected.is_empty(), "{rejected:?}");
    checkpoint.expect("a checkpoint")
}

fn run_folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn what_was_saved_is_loaded_to_the_bit() {
    let (run, mut values) = (run_folder(), Values::new(12_000));
    values.groups[0][0][..4].copy_from_slice(&[-0.0, f32::from_bits(1), f32::MAX, 1e-39]);
    let path = values.save(run.path(), 3).unwrap();
    assert_eq!(path, run.path().join("ckpt/step-00012000"));
    let latest = fs::read(run.path().join("ckpt/LATEST")).unwrap();
    assert_eq!(latest, b"step-00012000\n");
    let mut checkpoint = sound(run.path());
    assert_eq!(checkpoint.path, path);
    values.assert_in(&mut checkpoint);
    assert_eq!(checkpoint.matmul_plans, values.contents().matmul_plans);

    let mut expected = values.contents().metadata;
    for (key, value) in
        [("format", "pt"), ("format_version", "1"), ("pixmim_version", pixmim::VERSION)]
    {
        expected.insert(key.to_owned(), value.to_owned());
    }
    assert_eq!(*checkpoint.metadata(), expected);
    assert_eq!(names(&path), FILES);
}

#[test]
fn without_plans_of_products_there_is_no_file_of_them() {
    let run = run_folder();
    let values = Values::new(5);
    let contents = Contents { matmul_plans: Vec::new(), ..values.contents() };
    let path = save(run.path(), &contents, 1).unwrap();
    assert_eq!(names(&path), ["MANIFEST", "model.safetensors", "optim.safetensors", "state.toml"]);
    assert!(sound(run.path()).matmul_plans.is_empty());
}

#[test]
fn a_run_without_checkpoints_has_no_newest() {
    let run = run_folder();
    assert!(matches!(newest(run.path()), Ok((None, rejected)) if rejected.is_empty()));
    fs::create_dir(run.path().join("ckpt")).unwrap();
    assert!(matches!(newest(run.path()), Ok((None, rejected)) if rejected.is_empty()));
}

#[test]
fn other_programs_can_read_the_weights() {
    let run = run_folder();
    let values = Values::new(5);
    let path = values.save(run.path(), 1).unwrap();
    let bytes = fs::read(path.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let (header_len, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
    assert_eq!(header_len % 8, 0, "the tensors are aligned");
    assert_eq!(file.len(), WEIGHTS.len() + FROZEN.len());
    let contents = values.contents();
    for NamedTensor { name, shape, data } in contents.weights.iter().chain(&contents.frozen) {
        let tensor = file.tensor(name).unwrap();
        assert_eq!((tensor.shape(), tensor.dtype()), (shape.as_slice(), safetensors::Dtype::F32));
        assert_eq!(tensor.data(), bytemuck::cast_slice::<f32, u8>(data));
    }
    let bytes = fs::read(path.join("optim.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), 2 * WEIGHTS.len());
    for (prefix, group) in [("exp_avg.", contents.exp_avg), ("exp_avg_sq.", contents.exp_avg_sq)] {
        for NamedTensor { name, data, .. } in group {
            let tensor = file.tensor(&format!("{prefix}{name}")).unwrap();
            assert_eq!(tensor.data(), bytemuck::cast_slice::<f32, u8>(data));
        }
    }
}

#[test]
fn the_same_contents_give_the_same_bytes() {
    let (one, two) = (run_folder(), run_folder());
    let values = Values::new(77);
    let (a, b) = (values.save(one.path(), 1).unwrap(), values.save(two.path(), 1).unwrap());
    for file in FILES {
        assert_eq!(fs::read(a.join(file)).unwrap(), fs::read(b.join(file)).unwrap(), "{file}");
    }
}

#[test]
fn every_changed_byte_is_detected() {
    let run = run_folder();
    let path = Values::new(31).save(run.path(), 1).unwrap();
    let originals = FILES.map(|file| fs::read(path.join(file)).unwrap());
    for trial in 0..1000 {
        let [which, place, how, mask] = philox4x32_10([trial, 0, 0, 0], [3, 9]);
        let which = which as usize % FILES.len();
        let mut bytes = originals[which].clone();
        let place = place as usize % bytes.len();
        // One bit, or any other byte.
        bytes[place] ^= if how % 2 == 0 { 1 << (mask % 8) } else { (mask % 255 + 1) as u8 };
        let file = path.join(FILES[which]);
        fs::write(&file, bytes).unwrap();
        let error = Checkpoint::open(&path).expect_err("a changed byte");
        assert!(matches!(error, Error::Corrupt { .. } | Error::Io { .. }), "{error}");
        assert_eq!(error.exit_code(), 5);
        fs::write(&file, &originals[which]).unwrap();
    }
    Checkpoint::open(&path).unwrap();
}

#[test]
fn a_missing_shorter_or_longer_file_is_detected() {
    let run = run_folder();
    let path = Values::new(31).save(run.path(), 1).unwrap();
    for name in FILES {
        let file = path.join(name);
        let original = fs::read(&file).unwrap();
        let longer = [original.as_slice(), b"\n"].concat();
        let shorter = &original[..original.len() - 1];
        for bytes in [shorter, &longer, &[]] {
            fs::write(&file, bytes).unwrap();
            let error = Checkpoint::open(&path).unwrap_err();
            assert!(matches!(error, Error::Corrupt { .. }), "{name}: {error}");
        }
        fs::remove_file(&file).unwrap();
        match Checkpoint::open(&path).unwrap_err() {
            Error::Io { path, source, .. } => {
                assert_eq!((path, source.kind()), (file.clone(), ErrorKind::NotFound));
            }
            other => panic!("{name}: {other}"),
        }
        fs::write(&file, original).unwrap();
    }
    Checkpoint::open(&path).unwrap();
}

#[test]
fn a_damaged_checkpoint_is_reported_and_the_one_before_it_used() {
    let run = run_folder();
    for step in [1000, 2000, 3000] {
        Values::new(step).save(run.path(), 5).unwrap();
    }
    let optim = run.path().join("ckpt/step-00003000/optim.safetensors");
    let mut bytes = fs::read(&optim).unwrap();
    *bytes.last_mut().unwrap() ^= 4;
    fs::write(&optim, bytes).unwrap();
    fs::remove_file(run.path().join("ckpt/step-00002000/MANIFEST")).unwrap();

    let (checkpoint, rejected) = newest(run.path()).unwrap();
    Values::new(1000).assert_in(&mut checkpoint.unwrap());
    let rejected_names: Vec<_> =
        rejected.iter().map(|rejected| rejected.path.file_name().unwrap()).collect();
    assert_eq!(rejected_names, ["step-00003000", "step-00002000"]);
    let why = rejected[0].why.to_string();
    let start = format!("{} is damaged: its crc32c is ", optim.display());
    assert!(why.starts_with(&start) && why.contains(", MANIFEST says "), "{why}");
}

#[test]
fn latest_is_followed_before_the_highest_step_and_reported_when_it_is_wrong() {
    let run = run_folder();
    for step in [1000, 3000, 2000] {
        Values::new(step).save(run.path(), 5).unwrap();
    }
    assert_eq!(sound(run.path()).state.step, 2000);
    for (text, rejected_name) in [
        ("step-00004000\n", "step-00004000"),
        ("step-00002000", "LATEST"),
        ("step-2000\n", "LATEST"),
        ("../ckpt/step-00002000\n", "LATEST"),
        ("", "LATEST"),
    ] {
        fs::write(run.path().join("ckpt/LATEST"), text).unwrap();
        let (checkpoint, rejected) = newest(run.path()).unwrap();
        assert_eq!(checkpoint.unwrap().state.step, 3000, "{text:?}");
        assert_eq!(rejected.len(), 1);
        assert!(rejected[0].path.ends_with(rejected_name), "{text:?}");
    }
    fs::remove_file(run.path().join("ckpt/LATEST")).unwrap();
    assert_eq!(sound(run.path()).state.step, 3000);
}

#[test]
fn only_the_last_ones_are_kept() {
    let run = run_folder();
    let save = |step, keep_last| {
        Values::new(step).save(run.path(), keep_last).unwrap();
        assert_eq!(sound(run.path()).state.step, step);
        saved(run.path())
    };
    save(10, 3);
    save(20, 3);
    assert_eq!(save(30, 3), ["step-00000010", "step-00000020", "step-00000030"]);
    assert_eq!(save(40, 3), ["step-00000020", "step-00000030", "step-00000040"]);
    assert_eq!(save(50, 2), ["step-00000040", "step-00000050"]);
    // A run rewound to 40: what it had later is not counted, and not touched before it is reached again.
    assert_eq!(save(45, 2), ["step-00000040", "step-00000045", "step-00000050"]);
    assert_eq!(save(50, 2), ["step-00000045", "step-00000050.2"]);
    assert_eq!(save(50, 2), ["step-00000045", "step-00000050.3"]);
    assert_eq!(save(60, 1), ["step-00000060"]);
}

#[test]
fn what_a_dead_process_left_is_removed_and_what_a_live_one_writes_is_not() {
    let run = run_folder();
    let ckpt = run.path().join("ckpt");
    let mut child = Command::new("sleep").arg("600").spawn().unwrap();
    let alive = ckpt.join(format!(".tmp-step-00000007-{}", child.id()));
    let mut dead = Command::new("true").spawn().unwrap();
    dead.wait().unwrap();
    fs::create_dir_all(alive.join("inner")).unwrap();
    fs::create_dir(ckpt.join(format!(".tmp-step-00000008-{}", dead.id()))).unwrap();
    fs::write(ckpt.join(format!(".tmp-LATEST-{}", dead.id())), "step").unwrap();
    assert!(newest(run.path()).unwrap().0.is_none(), "taken for a checkpoint");
    Values::new(9).save(run.path(), 1).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    if cfg!(target_os = "linux") {
        assert!(alive.exists());
        fs::remove_dir_all(&alive).unwrap();
    }
    assert_eq!(saved(run.path()), ["step-00000009"]);
}

#[test]
fn another_architecture_is_refused_with_the_first_difference() {
    let run = run_folder();
    Values::new(8).save(run.path(), 1).unwrap();
    let mut checkpoint = sound(run.path());
    let cure = "it belongs to another architecture: give the [model] it was trained with, \
                or start a new run";
    let all = [WEIGHTS.as_slice(), &FROZEN].concat();

    let mut wider = all.clone();
    wider[3].1 = &[27, 9];
    wider[0].1 = &[1, 1, 9];
    wider.push(("blocks.1.norm1.weight", &[9]));
    wider.remove(1);
    let why = refusal(&mut checkpoint, Part::Model, &wider);
    let first = "/model.safetensors: `cls_token` is F32 [1, 1, 7], this model needs F32 [1, 1, 9]";
    assert_eq!(why, format!("{first} (1 missing, 1 unexpected, 2 different); {cure}"));

    let why = refusal(&mut checkpoint, Part::Model, &all[..6]);
    let first = "/model.safetensors: `decoder_pos_embed` [1, 5, 5] is not part of this model";
    assert_eq!(why, format!("{first} (0 missing, 1 unexpected, 0 different); {cure}"));

    let why = refusal(&mut checkpoint, Part::ExpAvgSq, &all);
    let first = "/optim.safetensors: `exp_avg_sq.pos_embed` is missing, this model needs it as \
                 F32 [1, 5, 7]";
    assert_eq!(why, format!("{first} (2 missing, 0 unexpected, 0 different); {cure}"));

    // The same number of elements in another arrangement is another tensor.
    let mut turned = all.clone();
    turned[3].1 = &[7, 21];
    let why = refusal(&mut checkpoint, Part::Model, &turned);
    assert!(why.contains("`blocks.0.attn.qkv.weight` is F32 [21, 7]"), "{why}");

    let mut data = [0.0; 6];
    let mut out = [NamedTensorMut { name: "cls_token", shape: vec![1, 1, 7], data: &mut data }];
    let error = checkpoint.read(Part::Model, &mut out).unwrap_err();
    assert_eq!(error.to_string(), "`cls_token` has shape [1, 1, 7], but 6 elements");
}

#[test]
fn another_config_is_refused() {
    let run = run_folder();
    Values::new(8).save(run.path(), 1).unwrap();
    let checkpoint = sound(run.path());
    checkpoint.check_config(&config_hash("[model]\ndim = 7\n")).unwrap();
    let error = checkpoint.check_config(&config_hash("[model]\ndim = 9\n")).unwrap_err();
    assert!(error.to_string().contains("resume with the config.toml of its run"), "{error}");
    // The check value that catalogues of checksums give for CRC-32C.
    assert_eq!(config_hash("123456789"), "e3069283");
}

/// Replaces a file of a checkpoint and makes the manifest agree with it.
fn forge(checkpoint: &Path, file: &str, bytes: &[u8]) {
    fs::write(checkpoint.join(file), bytes).unwrap();
    let manifest = FILES[1..].iter().map(|file| {
        let bytes = fs::read(checkpoint.join(file)).unwrap();
        format!("{file}  {}  {:08x}\n", bytes.len(), crc32c::crc32c(&bytes))
    });
    fs::write(checkpoint.join("MANIFEST"), manifest.collect::<String>()).unwrap();
}

#[test]
fn a_newer_format_is_refused_with_a_sentence_and_an_unknown_key_is_not() {
    let run = run_folder();
    let path = Values::new(8).save(run.path(), 1).unwrap();
    let state = fs::read_to_string(path.join("state.toml")).unwrap();
    assert!(state.starts_with("format_version = 1\n"), "{state}");
    forge(&path, "state.toml", format!("{state}\nlearned_later = 5\n").as_bytes());
    Values::new(8).assert_in(&mut Checkpoint::open(&path).unwrap());

    forge(&path, "state.toml", b"format_version = 2\nstep = \"in other words\"\n");
    let error = Checkpoint::open(&path).unwrap_err();
    assert_eq!(error.exit_code(), 1);
    let why = format!(
        "{}: has format_version 2, pixmim {} reads up to 1; update pixmim or use an older checkpoint",
        path.join("state.toml").display(),
        pixmim::VERSION
    );
    assert_eq!(error.to_string(), why);
}

#[test]
fn a_checkpoint_of_format_1_loads_forever() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoint-v1");
    let mut checkpoint = Checkpoint::open(&path).unwrap();
    Values::new(12_000).assert_in(&mut checkpoint);
    assert!(checkpoint.matmul_plans.is_empty());
    assert_eq!(checkpoint.metadata()["target"], "low_freq");
    assert_eq!(checkpoint.metadata()["format_version"], "1");
}

#[test]
fn contents_that_contradict_themselves_are_refused_and_nothing_is_written() {
    let run = run_folder();
    let values = Values::new(4);
    let invalid = |change: &dyn Fn(&mut Contents<'_>), why: &str| {
        let mut contents = values.contents();
        change(&mut contents);
        let error = save(run.path(), &contents, 2).unwrap_err();
        assert!(matches!(&error, Error::Invalid { .. }), "{error}");
        assert_eq!(error.to_string(), why);
    };
    invalid(
        &|c| c.weights[1].name = "pos_embed",
        "`pos_embed` is a name already taken in the checkpoint",
    );
    invalid(&|c| c.weights[0].shape = vec![7, 2], "`cls_token` has shape [7, 2], but 7 elements");
    let why = format!("`pos_embed` has shape [{}, 2], but 35 elements", usize::MAX);
    invalid(&|c| c.frozen[0].shape = vec![usize::MAX, 2], &why);
    let why = "must have the names, shapes and order of the weights";
    invalid(&|c| c.exp_avg.swap(0, 1), &format!("`exp_avg` {why}"));
    invalid(&|c| c.exp_avg_sq.truncate(4), &format!("`exp_avg_sq` {why}"));
    let error = save(run.path(), &values.contents(), 0).unwrap_err();
    assert_eq!(error.to_string(), "`keep_last` is 0, must be at least 1");

    for (group, index) in [(0, 0), (2, 0), (3, 4)] {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut values = Values::new(4);
            *values.groups[group][index].last_mut().unwrap() = bad;
            let error = values.save(run.path(), 2).unwrap_err();
            assert!(matches!(error, Error::Diverged { step: 4, .. }), "{error}");
        }
    }
    assert!(names(run.path()).is_empty());
}

#[test]
fn a_place_that_cannot_be_written_is_named_by_the_save_that_meets_it() {
    let failure = |run: &Path| match Values::new(6).save(run, 2).unwrap_err() {
        error @ Error::Io { .. } => {
            assert_eq!(error.exit_code(), 5);
            error.to_string()
        }
        other => panic!("{other}"),
    };
    // The folder of checkpoints is a file.
    let run = run_folder();
    let ckpt = run.path().join("ckpt");
    fs::write(&ckpt, "not a folder").unwrap();
    let why = failure(run.path());
    assert!(why.starts_with(&format!("cannot list {}: ", ckpt.display())), "{why}");
    assert!(matches!(newest(run.path()), Err(Error::Io { .. })));
    // The run's folder is a file, or is not there.
    let why = failure(&ckpt);
    assert!(why.starts_with(&format!("cannot create {}: ", ckpt.join("ckpt").display())), "{why}");
    let why = failure(&run.path().join("gone"));
    assert!(why.starts_with("cannot create "), "{why}");
    // LATEST cannot be replaced, as it is a folder: by then the checkpoint itself is safe.
    let run = run_folder();
    let latest = run.path().join("ckpt/LATEST");
    fs::create_dir_all(latest.join("inner")).unwrap();
    let why = failure(run.path());
    assert!(why.starts_with(&format!("cannot rename to {}: ", latest.display())), "{why}");
    assert_eq!(saved(run.path()), ["step-00000006"]);
}

/// This test, as another process that finds `run` in its environment.
fn again(test: &str, run: &Path, through: &str) -> Command {
    let mut command = Command::new("sh");
    let script = format!("{through} exec \"$0\" --exact {test} --nocapture");
    command.args(["-c", &script]).arg(std::env::current_exe().unwrap()).env("PIXMIM_TEST_RUN", run);
    command
}

#[test]
fn a_file_that_the_system_cuts_off_is_reported_and_removed() {
    if let Some(run) = std::env::var_os("PIXMIM_TEST_RUN") {
        match Values::new(20).save(Path::new(&run), 1).unwrap_err() {
            Error::Io { action: "write", path, source } => {
                assert!(path.ends_with("model.safetensors"), "{}", path.display());
                assert_eq!(source.kind(), ErrorKind::FileTooLarge);
            }
            other => panic!("{other}"),
        }
        println!("the child saw it");
        return;
    }
    let run = run_folder();
    Values::new(10).save(run.path(), 1).unwrap();
    // One block is 512 or 1024 bytes, less than the weights need; the signal would kill before the call returns.
    let name = "a_file_that_the_system_cuts_off_is_reported_and_removed";
    let child = again(name, run.path(), "trap '' XFSZ; ulimit -f 1;").output().unwrap();
    let output = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && output.contains("the child saw it"), "{child:?}");
    assert_eq!(saved(run.path()), ["step-00000010"]);
    Values::new(10).assert_in(&mut sound(run.path()));
}

#[test]
fn a_killed_run_goes_on_from_its_last_checkpoint() {
    if let Some(run) = std::env::var_os("PIXMIM_TEST_RUN") {
        let run = Path::new(&run);
        let first = newest(run).unwrap().0.map_or(1, |checkpoint| checkpoint.state.step + 1);
        for step in first.. {
            Values::new(step).save(run, 2).unwrap();
            println!("saved {step}");
        }
    }
    let run = run_folder();
    let mut last = 0;
    for trial in 0..20 {
        let mut child = again("a_killed_run_goes_on_from_its_last_checkpoint", run.path(), "")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines =
            BufReader::new(child.stdout.take().unwrap()).lines().map(|line| line.unwrap());
        let mut told = |line: String| {
            let step = line.rsplit_once("saved ").map(|(_, step)| step.parse::<u64>().unwrap());
            last = step.unwrap_or(last);
            step.is_some()
        };
        while !told(lines.next().expect("a save")) {}
        let micros = philox4x32_10([trial, 0, 0, 0], [5, 1])[0] % 20_000;
        std::thread::sleep(Duration::from_micros(micros.into()));
        child.kill().unwrap();
        child.wait().unwrap();
        let _ = lines.map(told).last();
        let mut checkpoint = sound(run.path());
        let step = checkpoint.state.step;
        assert!((last..=last + 1).contains(&step), "loaded {step} after {last} was saved");
        Values::new(step).assert_in(&mut checkpoint);
    }
    let step = last + 2;
    Values::new(step).save(run.path(), 1).unwrap();
    assert_eq!(saved(run.path()), [format!("step-{step:08}")]);
}

#[test]
fn a_checkpoint_deleted_while_it_is_open_can_still_be_read() {
    let run = run_folder();
    let values = Values::new(3);
    values.save(run.path(), 1).unwrap();
    let mut checkpoint = sound(run.path());
    Values::new(4).save(run.path(), 1).unwrap();
    assert!(!checkpoint.path.exists());
    values.assert_in(&mut checkpoint);
}
