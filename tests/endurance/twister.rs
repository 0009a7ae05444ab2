//! What Python's `random.Random(seed).getrandbits(32)` gives: the Mersenne Twister MT19937, seeded by
//! an array of one word.

const WORDS: usize = 624;
const AHEAD: usize = 397;

/// A generator.
#[derive(Clone)]
pub(crate) struct Twister {
    words: [u32; WORDS],
    next: usize,
}

impl Twister {
    /// As `random.Random(seed)`.
    pub(crate) fn new(seed: u32) -> Self {
        let mut words = [0_u32; WORDS];
        words[0] = 19_650_218;
        let mixed = |words: &[u32; WORDS], number: usize| {
            let before = words[number - 1];
            before ^ (before >> 30)
        };
        for number in 1..WORDS {
            let next = mixed(&words, number).wrapping_mul(1_812_433_253);
            words[number] = next.wrapping_add(number as u32);
        }
        let mut number = 1;
        let mut step = |words: &mut [u32; WORDS], factor: u32, add: &dyn Fn(usize) -> u32| {
            let product = mixed(words, number).wrapping_mul(factor);
            words[number] = (words[number] ^ product).wrapping_add(add(number));
            number += 1;
            if number == WORDS {
                words[0] = words[WORDS - 1];
                number = 1;
            }
        };
        for _ in 0..WORDS {
            step(&mut words, 1_664_525, &|_| seed);
        }
        for _ in 1..WORDS {
            step(&mut words, 1_566_083_941, &|number| (number as u32).wrapping_neg());
        }
        words[0] = 0x8000_0000;
        Self { words, next: WORDS }
    }

    /// As `getrandbits(32)`.
    pub(crate) fn bits(&mut self) -> u32 {
        if self.next == WORDS {
            for number in 0..WORDS {
                let (this, next) = (self.words[number], self.words[(number + 1) % WORDS]);
                let joined = this & 0x8000_0000 | next & 0x7fff_ffff;
                let twist = if joined & 1 == 0 { 0 } else { 0x9908_b0df };
                self.words[number] = self.words[(number + AHEAD) % WORDS] ^ (joined >> 1) ^ twist;
            }
            self.next = 0;
        }
        let mut word = self.words[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= word << 7 & 0x9d2c_5680;
        word ^= word << 15 & 0xefc6_0000;
        word ^ (word >> 18)
    }
}
