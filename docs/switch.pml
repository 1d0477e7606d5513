/* The switch of a handoff, from SWITCHING to a final state. docs/switch.md explains it and says how to run it.
 *
 * It follows controller/handoff_controller/machine.py, driver.py and disks.py, and agent/handoff_agent/rules.py.
 * Seeded bugs: -DBUG_SOURCE_TIMEOUT, -DBUG_NO_COMPARE, -DBUG_ABORT_FIRST, -DBUG_FENCE_FORGOTTEN,
 * -DBUG_FALSE_FENCE, -DBUG_RELEASE_FIRST, -DBUG_PULL_UNFENCED, -DBUG_BACK_FROM_ARRIVED.
 */

#ifndef TERMS
#define TERMS 2   /* leaders, one after the other; a replaced one goes on without knowing */
#endif
#ifndef FAULTS
#define FAULTS 2  /* messages, answers and writes that get lost or late, until faults stop */
#endif

/* PULLING is FINISHING before disks_arrived; GIVEN_UP is FINISHING with the source, and what it had, given up. */
mtype:Record = { SWITCHING, COMMITTED, PULLING, FINISHING, GIVEN_UP, DONE, ABORTING, ABORTED };
mtype:Copy = { RUNS, PAUSED, LISTENING, GONE };
mtype:Side = { READY, SWITCHES, HELD, RELEASED, PREPARED, ACTIVE, FINALIZED, FAILED, UNDONE };
mtype:Order = { SWITCH_OVER, RELEASE, ABORT_SOURCE, ACTIVATE, FINALIZE, ABORT_DESTINATION, EVICT };
mtype:Answer = { NOTHING, REFUSED, ANSWERED };

/* Where it begins. With -DPULL, a fast migration from its commit on: what comes before is the same for all. */
#ifdef PULL
#define pulls true
#define FIRST_RECORD COMMITTED
#define FIRST_COPY   PAUSED
#define FIRST_SOURCE HELD
#else
#define pulls false
#define FIRST_RECORD SWITCHING
#define FIRST_COPY   RUNS
#define FIRST_SOURCE READY
#endif

/* etcd: the migration's record, its version, and whose key is the leader's. */
mtype:Record record = FIRST_RECORD;
byte version = 0;
byte leader = 0;

/* The two hosts: QEMU's copy, the agent's state, the highest term that the agent has obeyed. */
mtype:Copy source = FIRST_COPY;
mtype:Copy destination = (pulls -> PAUSED : LISTENING);
mtype:Side at_source = FIRST_SOURCE;
mtype:Side at_destination = PREPARED;
byte source_term = 0;
byte destination_term = 0;
bool never_ran = false;

bool whole = !pulls;     /* the destination's disks need nothing of the source's */
bool kept = false;       /* in the record: the source's images outlive its copy */

byte faults = FAULTS;
bool source_died = false;
bool destination_died_running = false;
bool fenced = false;     /* the destination's host was turned off; it comes back later, without the copy */

/* ---- The agents: what is allowed in which state, and what it does to the copy. */

chan orders = [0] of { mtype:Order, byte, bool };        /* which, of which term, whether the answer will be heard */
chan answers = [0] of { mtype:Answer, mtype:Side };

inline obey(what, by, answer) {
	answer = REFUSED;
	if
	:: what == SWITCH_OVER && by >= source_term ->
		source_term = by;
		if
		:: at_source == READY -> at_source = SWITCHES; answer = ANSWERED
		:: at_source != READY && at_source != UNDONE -> answer = ANSWERED
		:: else
		fi
	:: what == RELEASE && by >= source_term ->
		source_term = by;
		if
		:: at_source == HELD ->
			assert(record == FINISHING || record == GIVEN_UP || record == DONE);
			assert(whole || kept);
			source = GONE; at_source = RELEASED; answer = ANSWERED
		:: at_source == RELEASED -> answer = ANSWERED
		:: else
		fi
	:: what == ABORT_SOURCE && by >= source_term ->
		source_term = by;
		if
		:: at_source != RELEASED && at_source != UNDONE ->
			if
			:: source == PAUSED ->
				assert(at_source != HELD || record == ABORTING || record == ABORTED);
				source = RUNS
			:: else
			fi;
			at_source = UNDONE; answer = ANSWERED
		:: at_source == UNDONE -> answer = ANSWERED
		:: else
		fi
	:: what == ACTIVATE && by >= destination_term ->
		destination_term = by;
		if
		:: at_destination == PREPARED ->
			assert(destination == PAUSED && record == COMMITTED);
			destination = RUNS; at_destination = ACTIVE; answer = ANSWERED
		:: at_destination == ACTIVE || at_destination == FINALIZED || at_destination == FAILED -> answer = ANSWERED
		:: else
		fi
	:: what == FINALIZE && by >= destination_term ->
		destination_term = by;
		if
		:: at_destination == ACTIVE -> at_destination = FINALIZED; answer = ANSWERED
		:: at_destination == FINALIZED -> answer = ANSWERED
		:: else
		fi
	:: what == ABORT_DESTINATION && by >= destination_term ->
		destination_term = by;
		if
		:: at_destination == PREPARED || at_destination == FAILED ->
			never_ran = true; destination = GONE; at_destination = UNDONE; answer = ANSWERED
		:: at_destination == UNDONE -> answer = ANSWERED
		:: else
		fi
	:: what == EVICT && by >= destination_term ->
		destination_term = by;
		assert(record == ABORTING || record == ABORTED);
		if
		:: at_destination == PREPARED || at_destination == ACTIVE || at_destination == FAILED ->
			destination = GONE; at_destination = UNDONE; answer = ANSWERED
		:: at_destination == UNDONE -> answer = ANSWERED
		:: else
		fi
	:: else
	fi
}

active proctype Agents() {
	mtype:Order what;
	byte by;
	bool heard;
	mtype:Answer answer;
end:	do
	:: atomic {
		orders?what,by,heard;
		obey(what, by, answer);
		if
		:: heard && (what == SWITCH_OVER || what == RELEASE || what == ABORT_SOURCE) -> answers!answer,at_source
		:: heard && (what == ACTIVATE || what == FINALIZE || what == ABORT_DESTINATION || what == EVICT) -> answers!answer,at_destination
		:: else
		fi;
		what = 0; by = 0; heard = false; answer = 0 }
	od
}

/* QEMU at the source, and the deadline of the pause: it ends held, or with the guest running again. Then its disks. */
active proctype Source() {
end:	do
	:: d_step { at_source == SWITCHES && source == RUNS -> source = PAUSED }
	:: d_step { at_source == SWITCHES && source == PAUSED && destination == LISTENING -> destination = PAUSED }
	:: d_step { at_source == SWITCHES && source == PAUSED && destination == PAUSED -> at_source = HELD }
	:: d_step { at_source == SWITCHES && source == PAUSED -> source = RUNS; at_source = FAILED }
	/* The pull, which goes on without the guest, and when a host that was off is back. */
	:: d_step { !whole && at_destination == ACTIVE && at_source == HELD -> whole = true }
#ifdef BUG_SOURCE_TIMEOUT
	:: d_step { at_source == HELD && source == PAUSED -> source = RUNS; at_source = FAILED }
#endif
	od
}

/* One of the two QEMUs dies, or none. */
active proctype Death() {
	if
	:: true
	:: d_step { source != GONE ->
		source = GONE; source_died = true;
		if
		:: at_source == READY || at_source == SWITCHES -> at_source = FAILED
		:: else
		fi }
	:: d_step { destination != GONE ->
		if
		:: destination == RUNS -> destination_died_running = true
		:: else
		fi;
		destination = GONE;
		if
		:: at_destination == PREPARED -> at_destination = FAILED; never_ran = true
		:: else
		fi }
	fi
}

/* ---- What is on its way: arrives whenever it likes, any number of times; a write to etcd once, or never. */

proctype Late(mtype:Order what; byte term) {
	do
	:: orders!what,term,false
	:: break
	od
}

inline apply(value, by, expected, result) {
	if
#ifdef BUG_NO_COMPARE
	:: true ->
#else
	:: leader == by && version == expected ->
#endif
		assert(value != ABORTING || record == SWITCHING || record == COMMITTED || record == PULLING);
		record = value; version++; result = ANSWERED;
		if
		:: value == GIVEN_UP -> kept = true
		:: else
		fi
#ifndef BUG_NO_COMPARE
	:: else -> result = REFUSED
#endif
	fi
}

proctype LateWrite(mtype:Record value; byte term; byte expected) {
	mtype:Answer unheard;
	if
	:: d_step { apply(value, term, expected, unheard); unheard = NOTHING }
	:: true
	fi
}

/* ---- The leader: driver.py. */

/* An order and its answer; either may be lost, and the order may be late. */
inline send(what) {
	if
	:: atomic { orders!what,term,true; answers?answer,seen }
	:: atomic { faults > 0 -> faults--; answer = NOTHING }
	:: atomic { faults > 0 -> faults--; orders!what,term,false; answer = NOTHING }
	:: atomic { faults > 0 -> faults--; run Late(what, term); answer = NOTHING }
	fi
}

/* Repeats until there is an answer. A leader that is refused as a replaced one ends, by its lease or its next write. */
inline insist(what) {
	do
	:: send(what);
		if
		:: answer == ANSWERED -> break
		:: answer != ANSWERED && leader != term -> goto over
		:: else
		fi
	od
}

/* The destination's host is turned off, by a command or by hand: certain, whatever its copy did. */
inline fence() {
	d_step {
		fenced = true;
#ifndef BUG_FALSE_FENCE
		if
		:: destination == RUNS -> destination_died_running = true
		:: else
		fi;
		destination = GONE;
		if
		:: at_destination == PREPARED -> at_destination = FAILED; never_ran = true
		:: else
		fi
#endif
	}
}

inline evict_or_abort() {
	if
	:: fenced -> send(EVICT)
	:: else -> send(ABORT_DESTINATION)
	fi
}

/* As far as it can be done now; the rest is done at the end. */
inline try(what) {
	do
	:: send(what);
		if
		:: break
		:: answer == NOTHING
		fi
	od
}

/* The next state, by compare-and-swap. After no answer the record is read again: the write may be there, or may come. */
inline advance(next) {
	if
	:: d_step { apply(next, term, known, answer);
		if
		:: answer == ANSWERED -> state = next; known = version; seen = READY
		:: else
		fi }
	:: atomic { faults > 0 -> faults--; apply(next, term, known, answer); answer = NOTHING }
	:: atomic { faults > 0 -> faults--; run LateWrite(next, term, known); answer = NOTHING }
	fi;
	if
	:: answer == REFUSED && leader != term -> goto over
	:: answer == ANSWERED
	:: else -> goto reads
	fi
}

proctype Leader(byte term) {
	mtype:Record state;
	byte known;
	mtype:Answer answer;
	mtype:Side seen;

reads:	skip;
	d_step { state = record; known = version; answer = NOTHING; seen = READY };
	do
	:: state == SWITCHING ->
		/* Cancelled, too late, or out of patience: at any time until it is HELD. */
		if
		:: send(SWITCH_OVER);
			if
			:: at_source == HELD -> seen = HELD
			:: at_source == FAILED || at_source == UNDONE -> seen = FAILED
			:: seen = FAILED
			fi
		:: seen = FAILED
		fi;
		if
		:: seen == HELD -> advance(COMMITTED)
		:: else ->
#ifdef BUG_ABORT_FIRST
			try(ABORT_SOURCE);
#endif
			advance(ABORTING)
		fi

	:: state == COMMITTED ->
		send(ACTIVATE);
#ifndef BUG_FENCE_FORGOTTEN
		/* The refusal of a copy that was aborted: a leader that ended before it could record the proof. */
		if
		:: answer == REFUSED && at_destination == UNDONE -> answer = ANSWERED; seen = UNDONE
		:: else
		fi;
#endif
		if
		:: answer == ANSWERED && (seen == ACTIVE || seen == FINALIZED) && pulls -> advance(PULLING)
		:: answer == ANSWERED && (seen == ACTIVE || seen == FINALIZED) && !pulls -> advance(FINISHING)
		:: answer == ANSWERED && (seen == FAILED || seen == UNDONE) && never_ran ->
			insist(ABORT_DESTINATION);
			advance(ABORTING)
		/* It may have run: no proof. Only a replaced leader comes here; the note that it writes is refused. */
		:: answer == ANSWERED && (seen == FAILED || seen == UNDONE) && !never_ran ->
			assert(fenced && leader != term);
			goto over
		:: answer == REFUSED && leader != term -> goto over
		:: answer == NOTHING && !fenced -> fence(); advance(ABORTING)
		:: else
		fi

	/* The destination tells that it has all. */
	:: state == PULLING && whole ->
#ifdef BUG_RELEASE_FIRST
		try(RELEASE);
#endif
		advance(FINISHING)
	/* It is silent, and an operator decides that the guest goes on from the switch. */
	:: state == PULLING && at_source == HELD ->
#ifndef BUG_PULL_UNFENCED
		fence();
#endif
		advance(ABORTING)
	/* The source is silent, and an operator gives it up; it may be back after all. */
	:: state == PULLING -> advance(GIVEN_UP)

#ifdef BUG_BACK_FROM_ARRIVED
	:: state == FINISHING -> fence(); advance(ABORTING)
#endif
	:: state == FINISHING || state == GIVEN_UP ->
		try(FINALIZE);
		try(RELEASE);
		advance(DONE)

	:: state == ABORTING ->
		insist(ABORT_SOURCE);
		if
		:: fenced -> try(EVICT)
		:: else -> try(ABORT_DESTINATION)
		fi;
		advance(ABORTED)

	/* Final: what an agent still holds is settled. */
	:: state == DONE && at_destination == ACTIVE && leader == term -> send(FINALIZE)
	:: state == DONE && at_source == HELD && leader == term -> send(RELEASE)
	:: state == ABORTED && at_source != UNDONE && leader == term -> send(ABORT_SOURCE)
	:: state == ABORTED && at_destination != UNDONE && leader == term -> evict_or_abort()
	:: (state == DONE || state == ABORTED) && leader != term -> break
	:: state == DONE && at_destination != ACTIVE && at_source != HELD -> break
	:: state == ABORTED && at_destination == UNDONE && at_source == UNDONE -> break
	od;
over:	skip
}

/* Another replica is elected, at any time; the one before is not told. */
active proctype Election() {
	do
	:: atomic { leader < TERMS -> leader++; run Leader(leader) }
	:: leader > 0 -> break
	od
}

/* ---- What has to hold. */

#define ONE_RUNS     (!(source == RUNS && destination == RUNS))
#define MAY_RUN      (record == COMMITTED || record == PULLING || record == FINISHING || record == GIVEN_UP || record == DONE)
#define MOVED        (record == DONE && source == GONE && (destination == RUNS || destination_died_running))
#define STAYED       (record == ABORTED && destination == GONE && (source == RUNS || source_died))

ltl safe { [] (ONE_RUNS && (destination == RUNS -> MAY_RUN)) }
ltl ends { <> [] (MOVED || STAYED) }
