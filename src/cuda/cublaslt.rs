//! Matrix products through cublasLt: one plan for each kind of product, made when it is first seen and kept.
//!
//! A plan pins the algorithm, so that every step of a run, and of the run that goes on from it, gives the same bits.
//! Algorithms that are not deterministic are never chosen. By default it is the one that cublasLt thinks best, which is the
//! same in every run on the same GPU, driver and version. With `PIXMIM_MATMUL=timed` it is the fastest of those offered:
//! some products gain, the first step takes longer, and since times of near equals vary, two runs may differ in their
//! last bits.

mod descriptors;
mod export;
mod problem;
mod timing;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use self::descriptors::{Addresses, Algorithm, Handle, Product, arithmetics};
use self::export::Pinned;
use self::problem::{Add, Problem};
use crate::cuda::driver::Matmul;
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
    plans: RwLock<HashMap<Problem, Arc<Plan>>>,
    /// Chosen by an earlier run. Locked while planning, so that each product is planned once.
    imported: Mutex<Pinned>,
    handle: Handle,
}

#[derive(Debug)]
struct Plan {
    /// Locked for the microseconds that its enqueuing takes: it holds the address of the bias.
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
            plans: RwLock::default(),
            imported: Mutex::default(),
            handle: Handle::new()?,
        })
    }

    /// Enqueues a product.
    pub(super) fn run(&self, matmul: &Matmul, lane: Lane<'_>) -> Result<()> {
        let problem = Problem::new(matmul)?;
        let plan = match self.known(&problem) {
            Some(plan) => plan,
            None => self.plan(&problem, lane)?,
        };
        let addresses = Addresses {
            a: matmul.b.ptr.0,
            b: matmul.a.ptr.0,
            c: matmul.add.unwrap_or(matmul.out.ptr).0,
            d: matmul.out.ptr.0,
            bias: matmul.bias.map_or(0, |bias| bias.0),
        };
        let mut product = plan.product.lock().unwrap_or_else(PoisonError::into_inner);
        self.multiply(&problem, &mut product, &plan.algorithm, addresses, lane)
    }

    fn known(&self, problem: &Problem) -> Option<Arc<Plan>> {
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
    fn plan(&self, problem: &Problem, lane: Lane<'_>) -> Result<Arc<Plan>> {
        if lane.stream.is_capturing()? {
            let why = format!(
                "{problem} is new, and its stream is being recorded; call once before capturing"
            );
            return Err(Error::Gpu { action: "plan a product", why });
        }
        let imported = self.imported();
        if let Some(plan) = self.known(problem) {
            return Ok(plan);
        }
        let (product, algorithm) = self.choose(problem, imported.get(problem), lane)?;
        let plan = Arc::new(Plan { product: Mutex::new(product), algorithm });
        let mut plans = self.plans.write().unwrap_or_else(PoisonError::into_inner);
        plans.insert(*problem, Arc::clone(&plan));
        Ok(plan)
    }

    fn choose(
        &self,
        problem: &Problem,
        imported: Option<&Algorithm>,
        lane: Lane<'_>,
    ) -> Result<(Product, Algorithm)> {
        // cublasLt wants an address with the bias while planning, and does not use it.
        let bias = lane.workspace;
        if let Some(algorithm) = imported {
            let product = Product::new(problem, algorithm.arithmetic as usize, bias)?;
            if self.handle.accepts(&product, algorithm) {
                return Ok((product, *algorithm));
            }
        }
        for arithmetic in 0..arithmetics(problem.factors()).len() {
            let mut product = Product::new(problem, arithmetic, bias)?;
            let candidates = self.handle.candidates(problem, &product, WORKSPACE_BYTES as u64)?;
            if candidates.is_empty() {
                continue;
            }
            let chosen = if self.timed {
                timing::fastest(self, problem, &mut product, &candidates, lane)?
            } else {
                0
            };
            return Ok((product, candidates[chosen]));
        }
        let why = format!("{problem}: cublasLt has no algorithm for it");
        Err(Error::Gpu { action: "plan a product", why })
    }

    /// All plans, also those imported and not used yet.
    pub(super) fn export(&self) -> Vec<u8> {
        let mut pinned = self.imported().clone();
        let plans = self.plans.read().unwrap_or_else(PoisonError::into_inner);
        pinned.extend(plans.iter().map(|(problem, plan)| (*problem, plan.algorithm)));
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
