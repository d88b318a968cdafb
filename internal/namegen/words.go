package namegen

// The words: short, plain, kind in every combination; no word for a person's looks, mind, origin
// or fortune, no animal that is an insult, none that needs explaining on the telephone.

var adjectives = []string{
	"able", "agile", "airy", "amber", "apt", "azure", "bold", "brave", "bright", "brisk", "busy", "calm", "candid", "cheery",
	"civil", "clean", "clear", "clever", "cosmic", "cozy", "crisp", "daring", "deft", "eager", "early", "easy", "epic", "fair",
	"fast", "fine", "fleet", "fluent", "fond", "frank", "free", "fresh", "gentle", "glad", "golden", "good", "grand", "great",
	"green", "handy", "happy", "hardy", "humble", "ideal", "jade", "jolly", "jovial", "just", "keen", "kind", "lively", "loyal",
	"lucid", "lucky", "lunar", "mellow", "merry", "mighty", "mild", "modest", "neat", "nimble", "noble", "novel", "polar", "polite",
	"proper", "proud", "quick", "quiet", "rapid", "ready", "regal", "robust", "rosy", "royal", "sage", "sharp", "silver", "smart",
	"smooth", "snug", "solar", "solid", "spry", "stable", "steady", "stellar", "strong", "sturdy", "sunny", "super", "sure", "swift",
	"tidy", "topaz", "true", "trusty", "upbeat", "valid", "vivid", "warm", "wise", "witty", "worthy", "zesty",
}

var animals = []string{
	"alpaca", "ant", "badger", "bat", "bear", "beaver", "bee", "bison", "bobcat", "camel", "caribou", "cat", "cheetah", "civet",
	"condor", "coral", "corgi", "cougar", "coyote", "crane", "cricket", "deer", "dingo", "dolphin", "dove", "duck", "eagle", "egret",
	"elk", "emu", "falcon", "ferret", "finch", "firefly", "fox", "gazelle", "gecko", "gibbon", "giraffe", "hare", "hawk",
	"heron", "husky", "ibex", "ibis", "iguana", "impala", "jaguar", "jay", "kestrel", "kiwi", "koala", "lark", "lemur",
	"lion", "llama", "lynx", "macaw", "magpie", "marlin", "marmot", "marten", "moose", "moth", "narwhal", "newt", "ocelot",
	"octopus", "okapi", "oriole", "osprey", "otter", "owl", "panda", "panther", "parrot", "pelican", "penguin", "pony", "puffin",
	"puma", "quail", "rabbit", "raven", "robin", "salmon", "seal", "shark", "sparrow", "squid", "stork", "swan", "tapir", "tern",
	"tiger", "toucan", "trout", "turtle", "walrus", "whale", "wolf", "wombat", "wren", "yak", "zebra",
}
