//! Saves that are cut off at every one of their file-system calls, and what a restart then finds.
#![cfg(unix)]

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::fs::{Disk, Fs};
use super::{
    Checkpoint, Contents, FOLDER, Name, NamedTensor, NamedTensorMut, Part, State, newest, write,
};
use crate::Error;

/// A disk that fails, and that keeps only what was synced when its power is cut.
#[derive(Default)]
struct Faulty {
    calls: usize,
    /// The call that fails, from 1; a write does half its work first. 0: none.
    fails_at: usize,
    /// Whether all later calls fail too: the process is gone.
    dies: bool,
    syncs: usize,
    /// A sync that does nothing, from 1. 0: none.
    lies_at: usize,
    /// Files of this name are on a device without space.
    full: Option<&'static str>,
    unsynced: Vec<Unsynced>,
}

/// What a power cut may undo.
enum Unsynced {
    /// Bytes of a file.
    Bytes(File),
    /// The name of a new file or folder.
    Created(PathBuf),
    Renamed {
        from: PathBuf,
        to: PathBuf,
        displaced: Option<Vec<u8>>,
        /// `to` has been removed since, which the disk has already done for what was in it.
        emptied: bool,
    },
}

impl Faulty {
    fn permit(&mut self) -> io::Result<()> {
        self.calls += 1;
        if self.calls == self.fails_at || self.dead() {
            return Err(io::Error::from(ErrorKind::StorageFull));
        }
        Ok(())
    }

    fn dead(&self) -> bool {
        self.dies && self.calls > self.fails_at
    }

    fn synced(&mut self, is_synced: impl Fn(&Unsynced) -> bool) {
        self.syncs += 1;
        if self.syncs != self.lies_at {
            self.unsynced.retain(|item| !is_synced(item));
        }
    }

    /// Undoes those changes that are `lost`; disks write back in any order.
    fn cut_power(self, lost: impl Fn(usize) -> bool) {
        for (index, item) in self.unsynced.into_iter().enumerate().rev() {
            match item {
                _ if !lost(index) => {}
                Unsynced::Bytes(file) => file.set_len(file.metadata().unwrap().len() / 2).unwrap(),
                Unsynced::Created(path) if path.exists() => Disk.remove(&path).unwrap(),
                Unsynced::Created(_) => {}
                Unsynced::Renamed { from, emptied: true, .. } => fs::create_dir(from).unwrap(),
                Unsynced::Renamed { from, to, displaced, .. } => {
                    fs::rename(&to, from).unwrap();
                    displaced.into_iter().for_each(|bytes| fs::write(&to, bytes).unwrap());
                }
            }
        }
    }
}

fn same_file(a: &File, b: &File) -> bool {
    let (a, b) = (a.metadata().unwrap(), b.metadata().unwrap());
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

impl Fs for Faulty {
    fn list(&mut self, dir: &Path) -> io::Result<Vec<String>> {
        self.permit()?;
        Disk.list(dir)
    }

    fn create_dir(&mut self, dir: &Path) -> io::Result<()> {
        self.permit()?;
        Disk.create_dir(dir)?;
        self.unsynced.push(Unsynced::Created(dir.to_owned()));
        Ok(())
    }

    fn create(&mut self, path: &Path) -> io::Result<File> {
        self.permit()?;
        if self.full.is_some_and(|name| path.ends_with(name)) {
            return OpenOptions::new().write(true).open("/dev/full");
        }
        let file = Disk.create(path)?;
        self.unsynced.push(Unsynced::Created(path.to_owned()));
        self.unsynced.push(Unsynced::Bytes(file.try_clone()?));
        Ok(file)
    }

    fn write(&mut self, file: &mut File, bytes: &[u8]) -> io::Result<()> {
        let permit = self.permit();
        let done = match permit {
            Ok(()) => bytes.len(),
            Err(_) if self.dead() => 0,
            Err(_) => bytes.len() / 2,
        };
        Disk.write(file, &bytes[..done])?;
        permit
    }

    fn sync(&mut self, file: &File) -> io::Result<()> {
        self.permit()?;
        self.synced(|item| matches!(item, Unsynced::Bytes(other) if same_file(file, other)));
        Ok(())
    }

    fn sync_dir(&mut self, dir: &Path) -> io::Result<()> {
        self.permit()?;
        self.synced(|item| match item {
            Unsynced::Bytes(_) => false,
            Unsynced::Created(path) | Unsynced::Renamed { to: path, .. } => {
                path.parent() == Some(dir)
            }
        });
        Ok(())
    }

    fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        self.permit()?;
        let displaced = fs::read(to).ok();
        Disk.rename(from, to)?;
        self.unsynced.retain(|item| !matches!(item, Unsynced::Created(path) if path == from));
        for item in &mut self.unsynced {
            if let Unsynced::Created(path) = item
                && let Ok(rest) = path.strip_prefix(from)
            {
                *path = to.join(rest);
            }
        }
        let (from, to) = (from.to_owned(), to.to_owned());
        self.unsynced.push(Unsynced::Renamed { from, to, displaced, emptied: false });
        Ok(())
    }

    fn remove(&mut self, path: &Path) -> io::Result<()> {
        self.permit()?;
        Disk.remove(path)?;
        for item in &mut self.unsynced {
            if let Unsynced::Renamed { to, emptied, .. } = item
                && to == path
            {
                *emptied = true;
            }
        }
        Ok(())
    }
}

/// Saves checkpoint number `samples` of a run, whose tensors are filled with that number.
fn save(
    fs: &mut Faulty,
    run: &Path,
    step: u64,
    samples: u64,
    keep_last: usize,
) -> crate::Result<PathBuf> {
    let data = [samples as f32; 15];
    let tensor = |name, shape: &[usize]| NamedTensor {
        name,
        shape: shape.to_vec(),
        data: &data[..elems(shape)],
    };
    let trained = vec![tensor("norm.weight", &[5]), tensor("decoder_pred.weight", &[3, 5])];
    let contents = Contents {
        weights: trained.clone(),
        frozen: vec![tensor("pos_embed", &[1, 2, 4])],
        exp_avg: trained.clone(),
        exp_avg_sq: trained,
        metadata: BTreeMap::new(),
        state: State {
            step,
            samples,
            seed: 7,
            skipped: 0,
            skipped_in_row: 0,
            steps_per_epoch: 11,
            smoothed_loss: 0.5,
            config_hash: super::config_hash(""),
            world_size: 1,
        },
        matmul_plans: vec![samples as u8; 9],
    };
    write::save(fs, run, &contents, keep_last)
}

/// A folder in memory where there is one: thousands of runs are made, and none needs the real disk.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn elems(shape: &[usize]) -> usize {
    shape.iter().product()
}

/// What a run had saved when a save was cut off.
struct History {
    /// The steps, in the order they were saved.
    steps: &'static [u64],
    /// The step that is being saved.
    step: u64,
    keep_last: usize,
    /// Whether an earlier process left its half of a checkpoint behind.
    leftover: bool,
}

const HISTORIES: [History; 5] = [
    History { steps: &[], step: 10, keep_last: 3, leftover: false },
    History { steps: &[10], step: 20, keep_last: 3, leftover: true },
    History { steps: &[10, 20, 30], step: 40, keep_last: 2, leftover: false },
    // A step saved twice, and a run that was rewound from 30 to 10.
    History { steps: &[10, 20], step: 20, keep_last: 1, leftover: false },
    History { steps: &[10, 30, 20], step: 30, keep_last: 3, leftover: true },
];

/// Cuts the save off at every call and in every way, and looks at what is left. Returns how many ways there were.
fn sweep(history: &History, lies_at: usize) -> Result<usize, String> {
    let previous = history.steps.len() as u64;
    let mut ways = 0;
    for fails_at in 1.. {
        let mut reached = true;
        // Way 0: the call fails. 1: the process dies there. 2, 3: the power is cut, and all, or nothing, is lost of
        // what was not synced. Then: one change alone is lost, or alone is not.
        let mut way = 0;
        let mut last_way = 3;
        while way <= last_way {
            let dir = scratch();
            let run = dir.path();
            for (index, &step) in history.steps.iter().enumerate() {
                save(&mut Faulty::default(), run, step, index as u64 + 1, usize::MAX).unwrap();
            }
            if history.leftover {
                // No process has this id: it is above what Linux hands out.
                fs::create_dir(run.join(FOLDER).join(".tmp-step-00000005-4194999")).unwrap();
            }
            let mut disk = Faulty { fails_at, dies: way > 0, lies_at, ..Faulty::default() };
            let saved = save(&mut disk, run, history.step, previous + 1, history.keep_last);
            let case = format!("call {fails_at}, way {way}, {} unsynced", disk.unsynced.len());
            reached = disk.calls >= fails_at;
            match &saved {
                Ok(_) if reached => return Err(format!("{case}: the fault was swallowed")),
                Err(Error::Io { path, .. }) if reached && path.starts_with(run) => {}
                Err(e) => return Err(format!("{case}: {e}")),
                Ok(_) => {}
            }
            last_way = 3 + 2 * disk.unsynced.len();
            match way {
                0 | 1 => {}
                2 => disk.cut_power(|_| true),
                3 => disk.cut_power(|_| false),
                _ if way % 2 == 0 => disk.cut_power(|index| index == (way - 4) / 2),
                _ => disk.cut_power(|index| index != (way - 4) / 2),
            }
            let oldest = if saved.is_ok() { previous + 1 } else { previous };
            restart(run, oldest, previous + 1).map_err(|why| format!("{case}: {why}"))?;
            way += 1;
        }
        ways += way;
        if !reached {
            break;
        }
    }
    Ok(ways)
}

/// The newest checkpoint must be number `oldest` to `newest_saved`, none may be torn, and saving goes on.
fn restart(run: &Path, oldest: u64, newest_saved: u64) -> Result<(), String> {
    let number = load(run)?.unwrap_or(0);
    if !(oldest..=newest_saved).contains(&number) {
        return Err(format!("loaded {number}, of {oldest} to {newest_saved}"));
    }
    for entry in Disk.list(&run.join(FOLDER)).unwrap_or_default() {
        if Name::parse(&entry).is_some() {
            Checkpoint::open(&run.join(FOLDER).join(&entry)).map_err(|e| e.to_string())?;
        }
    }
    save(&mut Faulty::default(), run, 50, 99, 2).map_err(|e| e.to_string())?;
    if load(run)? != Some(99) {
        return Err("the save after the restart is not the newest".into());
    }
    match Disk.list(&run.join(FOLDER)).unwrap().iter().find(|entry| entry.starts_with(".tmp")) {
        Some(entry) => Err(format!("{entry} was left behind")),
        None => Ok(()),
    }
}

/// Number of the newest checkpoint, all of whose tensors are looked at.
fn load(run: &Path) -> Result<Option<u64>, String> {
    let (found, rejected) = newest(run).map_err(|e| e.to_string())?;
    if let Some(rejected) = rejected.first() {
        return Err(format!("{} was rejected: {}", rejected.path.display(), rejected.why));
    }
    let Some(mut checkpoint) = found else { return Ok(None) };
    let samples = checkpoint.state.samples;
    for part in [Part::Model, Part::ExpAvg, Part::ExpAvgSq] {
        let (mut norm, mut pred, mut pos) = ([f32::NAN; 5], [f32::NAN; 15], [f32::NAN; 8]);
        let mut out = vec![
            NamedTensorMut { name: "decoder_pred.weight", shape: vec![3, 5], data: &mut pred },
            NamedTensorMut { name: "norm.weight", shape: vec![5], data: &mut norm },
        ];
        if part == Part::Model {
            let shape = vec![1, 2, 4];
            out.push(NamedTensorMut { name: "pos_embed", shape, data: &mut pos });
        }
        checkpoint.read(part, &mut out).map_err(|e| e.to_string())?;
        if out.iter().flat_map(|tensor| &*tensor.data).any(|&x| x != samples as f32) {
            return Err(format!("{part:?} is not what was saved"));
        }
    }
    Ok(Some(samples))
}

#[test]
fn a_save_cut_off_anywhere_leaves_the_checkpoint_before_it_or_its_own() {
    for history in &HISTORIES {
        let ways = sweep(history, 0).unwrap();
        assert!(ways > 300, "only {ways} ways");
    }
}

#[test]
fn no_sync_of_a_save_can_be_left_out() {
    // Only the first save of a run creates a folder, and only where there are many are some deleted.
    for (history, syncs) in
        [(&HISTORIES[0], 1..=1), (&HISTORIES[1], 1..=9), (&HISTORIES[2], 10..=10)]
    {
        for lies_at in syncs {
            assert!(sweep(history, lies_at).is_err(), "sync {lies_at} is not needed");
        }
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_device_is_reported_by_the_save_that_meets_it_and_nothing_is_left() {
    for name in
        ["matmul-plans.bin", "model.safetensors", "optim.safetensors", "state.toml", "MANIFEST"]
    {
        let dir = scratch();
        save(&mut Faulty::default(), dir.path(), 10, 1, 3).unwrap();
        let mut disk = Faulty { full: Some(name), ..Faulty::default() };
        match save(&mut disk, dir.path(), 20, 2, 3) {
            Err(Error::Io { action: "write", path, source }) => {
                assert!(path.ends_with(name), "{}", path.display());
                assert_eq!(source.kind(), ErrorKind::StorageFull);
            }
            other => panic!("{name}: {other:?}"),
        }
        assert_eq!(load(dir.path()), Ok(Some(1)));
        let mut entries = Disk.list(&dir.path().join(FOLDER)).unwrap();
        entries.sort();
        assert_eq!(entries, ["LATEST", "step-00000010"]);
    }
}
