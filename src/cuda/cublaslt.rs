//! Matrix products through cublasLt: one plan for each kind of product, made when it is first seen and kept.
//!
//! A plan pins the algorithm, so that every step of a run, and of the run that goes on from it, gives the same bits.
//! Algorithms that are not deterministic are never chosen. By default it is the one that cublasLt thinks best, which is the
//! same in every run on the same GPU, driver and version. With `PIXMIM_MATMUL=timed` it is the fastest of those offered:
//! some products gain, the first step takes longer, and since times of near equals vary, two runs may differ in their
//! last bits.
//!
//! `PIXMIM_EPILOGUES=gelu,bias` (or one of the two) makes products do what are passes of their own by default: see
//! [`Epilogues`] and docs/kernels/linear.md.

mod descriptors;
mod export;
mod problem;
mod timing;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use self::descriptors::{Addresses, Algorithm, Handle, Product, arithmetics};
use self::export::Pinned;
use self::problem::{Add, Extra, Problem};
use crate::cuda::driver::{Epilogue, Epilogues, Matmul};
use crate::cuda::nvidia::Stream;
use crate::cuda::probe::{Found, Gpu};
use crate::{Error, Result};

/// Every function of libcublasLt called below this module.
pub(super) const SYMBOLS: [&str; 15] = descriptors::SYMBOLS;

/// What NVIDIA recommends for Hopper.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;

/// Where products go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lane<'a> {
    pub(super) stream: &'a Stream,
    /// Address of [`WORKSPACE_BYTES`] that only products of this stream use: two streams may run at once.
    pub(super) workspace: u64,
}

/// The plans of a GPU, for all its streams.
#[derive(Debug)]
pub(super) struct Plans {
    /// What the chosen algorithms hold for.
    identity: String,
    /// Whether to time the algorithms; else the first is taken.
    timed: bool,
    epilogues: Epilogues,
    plans: RwLock<HashMap<Problem, Planned>>,
    /// Chosen by an earlier run. Locked while planning, so that each product is planned once.
    imported: Mutex<Pinned>,
    handle: Handle,
}

/// None: cublasLt has no algorithm, and there is another way.
type Planned = Option<Arc<Plan>>;

#[derive(Debug)]
struct Plan {
    /// Locked for the microseconds that its enqueuing takes: it holds the addresses of the epilogue.
    product: Mutex<Product>,
    algorithm: Algorithm,
}

impl Plans {
    /// For a GPU whose context is current.
    pub(super) fn new(gpu: &Gpu, found: &Found) -> Result<Self> {
        let timed = match std::env::var("PIXMIM_MATMUL") {
            Err(_) => false,
            Ok(value) if value == "timed" => true,
            Ok(value) => {
                let why = format!(
                    "is `{value}`; `timed` takes the fastest algorithm, unset it for cublasLt's first"
                );
                return Err(Error::invalid("PIXMIM_MATMUL", why));
            }
        };
        let (name, driver, version) = (&gpu.name, found.driver, found.cublaslt.version);
        Ok(Self {
            identity: format!("{name}, driver {driver}, cublasLt {version}"),
            timed,
            epilogues: epilogues()?,
            plans: RwLock::default(),
            imported: Mutex::default(),
            handle: Handle::new()?,
        })
    }

    pub(super) fn epilogues(&self) -> Epilogues {
        self.epilogues
    }

    /// Whether there is an algorithm for a product that can be done in another way.
    pub(super) fn offers(&self, matmul: &Matmul, lane: Lane<'_>) -> Result<bool> {
        Ok(self.planned(&Problem::new(matmul)?, lane)?.is_some())
    }

    /// Enqueues a product.
    pub(super) fn run(&self, matmul: &Matmul, lane: Lane<'_>) -> Result<()> {
        let problem = Problem::new(matmul)?;
        let plan = self.planned(&problem, lane)?.ok_or_else(|| none_for(&problem))?;
        let (sums, aux) = match matmul.epilogue {
            Epilogue::None => (None, None),
            Epilogue::Gelu(pre) | Epilogue::GeluSlope(pre) => (None, Some(pre)),
            Epilogue::RowSums(sums) => (Some(sums), None),
        };
        let addresses = Addresses {
            a: matmul.b.ptr.0,
            b: matmul.a.ptr.0,
            c: matmul.add.unwrap_or(matmul.out.ptr).0,
            d: matmul.out.ptr.0,
            vector: sums.or(matmul.bias).unwrap_or_default().0,
            aux: aux.unwrap_or_default().0,
        };
        let mut product = plan.product.lock().unwrap_or_else(PoisonError::into_inner);
        self.multiply(&problem, &mut product, &plan.algorithm, addresses, lane)
    }

    fn planned(&self, problem: &Problem, lane: Lane<'_>) -> Result<Planned> {
        match self.known(problem) {
            Some(planned) => Ok(planned),
            None => self.plan(problem, lane),
        }
    }

    fn known(&self, problem: &Problem) -> Option<Planned> {
        self.plans.read().unwrap_or_else(PoisonError::into_inner).get(problem).cloned()
    }

    fn imported(&self) -> MutexGuard<'_, Pinned> {
        self.imported.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn multiply(
        &self,
        problem: &Problem,
        product: &mut Product,
        algorithm: &Algorithm,
        addresses: Addresses,
        lane: Lane<'_>,
    ) -> Result<()> {
        let beta = if problem.add() == Add::Nothing { 0.0 } else { 1.0 };
        self.handle.multiply(product, algorithm, addresses, beta, lane).map_err(|error| match error
        {
            Error::Gpu { action, why } => Error::Gpu { action, why: format!("{problem}: {why}") },
            error => error,
        })
    }

    /// Plans a product, unless another thread has just done so.
    fn plan(&self, problem: &Problem, lane: Lane<'_>) -> Result<Planned> {
        if lane.stream.is_capturing()? {
            let why = format!(
                "{problem} is new, and its stream is being recorded; call once before capturing"
            );
            return Err(Error::Gpu { action: "plan a product", why });
        }
        let imported = self.imported();
        if let Some(planned) = self.known(problem) {
            return Ok(planned);
        }
        let chosen = self.choose(problem, imported.get(problem), lane)?;
        let planned = chosen
            .map(|(product, algorithm)| Arc::new(Plan { product: Mutex::new(product), algorithm }));
        let mut plans = self.plans.write().unwrap_or_else(PoisonError::into_inner);
        plans.insert(*problem, planned.clone());
        Ok(planned)
    }

    fn choose(
        &self,
        problem: &Problem,
        imported: Option<&Option<Algorithm>>,
        lane: Lane<'_>,
    ) -> Result<Option<(Product, Algorithm)>> {
        // While planning cublasLt looks at the alignment of the epilogue's addresses. All that is known of them is 16.
        let address = lane.workspace + 16;
        match imported {
            Some(None) => return Ok(None),
            Some(Some(algorithm)) => {
                let product = Product::new(problem, algorithm.arithmetic as usize, address)?;
                if self.handle.accepts(&product, algorithm) {
                    return Ok(Some((product, *algorithm)));
                }
            }
            None => {}
        }
        for arithmetic in 0..arithmetics(problem.factors()).len() {
            let mut product = Product::new(problem, arithmetic, address)?;
            let candidates = self.handle.candidates(problem, &product, WORKSPACE_BYTES as u64)?;
            if candidates.is_empty() {
                continue;
            }
            let chosen = if self.timed {
                timing::fastest(self, problem, &mut product, &candidates, lane)?
            } else {
                0
            };
            return Ok(Some((product, candidates[chosen])));
        }
        if problem.extra() == Extra::RowSums { Ok(None) } else { Err(none_for(problem)) }
    }

    /// All plans, also those imported and not used yet.
    pub(super) fn export(&self) -> Vec<u8> {
        let mut pinned = self.imported().clone();
        let plans = self.plans.read().unwrap_or_else(PoisonError::into_inner);
        let algorithm = |planned: &Planned| planned.as_ref().map(|plan| plan.algorithm);
        pinned.extend(plans.iter().map(|(problem, planned)| (*problem, algorithm(planned))));
        export::write(&self.identity, &pinned)
    }

    /// Takes over plans for products not seen yet, and returns how many there are.
    pub(super) fn import(&self, bytes: &[u8]) -> Result<usize, String> {
        let pinned = export::read(bytes, &self.identity, WORKSPACE_BYTES as u64)?;
        let count = pinned.len();
        *self.imported() = pinned;
        Ok(count)
    }
}

/// What `PIXMIM_EPILOGUES` asks for.
fn epilogues() -> Result<Epilogues> {
    let mut epilogues = Epilogues::default();
    let Ok(value) = std::env::var("PIXMIM_EPILOGUES") else { return Ok(epilogues) };
    for name in value.split(',') {
        match name {
            "gelu" => epilogues.gelu = true,
            "bias" => epilogues.bias = true,
            _ => {
                let why = format!(
                    "is `{value}`; `gelu`, `bias` or `gelu,bias` are done by products, unset it for passes of their own"
                );
                return Err(Error::invalid("PIXMIM_EPILOGUES", why));
            }
        }
    }
    Ok(epilogues)
}

/// No algorithm. GELU is not done in another way: the two forms differ, and a network has one.
fn none_for(problem: &Problem) -> Error {
    let why = format!("{problem}: cublasLt has no algorithm for it");
    match problem.extra() {
        Extra::Gelu | Extra::GeluSlope => {
            Error::invalid("PIXMIM_EPILOGUES", format!("asks for `gelu`, and {why}; leave it out"))
        }
        _ => Error::Gpu { action: "plan a product", why },
    }
}
