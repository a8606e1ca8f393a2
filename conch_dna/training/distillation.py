"""DOMAIN_PROMPTS: for each of the six domains a system prompt and example user prompts.

It knows no model and no tokenizer; it holds texts and imports nothing heavy. The system prompts
show the objects that schemas.py describes. To add a domain, add its system prompt, 24 or more
examples and its schema: CLI choices and tests follow.
"""

# Two more lines of parentheses for each example would hide the texts; a test finds lost commas.

from pathlib import Path
from typing import TypedDict

from conch_dna.errors import ConchError

# A file for each domain, of records that show its answers.
DEMONSTRATIONS = Path(__file__).parent.parent / "assets" / "demonstrations"


class DomainPrompts(TypedDict):
    """What a teacher is asked in one domain.

    Keys:
        system: the instruction that stands before every prompt of the domain.
        examples: user prompts, each of one to three sentences, none of them repeated.
    """

    system: str
    examples: list[str]


DOMAIN_PROMPTS: dict[str, DomainPrompts] = {
    "thinking": {
        "system": (
            "You think a question through before you answer it. Separate what is given from what "
            "you assume, take one step at a time, check any arithmetic, and look for one thing "
            "that could prove you wrong. Answer with one JSON object of this shape and nothing "
            'else: {"conclusion": "The answer in one or two sentences.", "reasons": ["The first '
            'of two to five steps that lead to it, in order.", "The next step."], "confidence": '
            '"medium", "would_change": "What would change your mind."} The "confidence" is low, '
            "medium or high."
        ),
        "examples": [
            "A train leaves at 9:40 and covers 210 km at an average of 84 km/h, with a 15 minute "
            "stop on the way. Can I make a meeting at 12:30 that is a ten minute walk from the "
            "station?",
            "My houseplant's lower leaves turn yellow while the soil stays damp for over a week. "
            "Is it more likely too much water, too little light or a lack of nitrogen?",
            "A heat pump costs 11,000 and would save about 900 a year against my gas boiler, "
            "which has perhaps six years left. Should I replace it now or wait until it fails?",
            "Why does a helium balloon in a car lean forward when the car speeds up, although "
            "everything else leans back?",
            "Two of our three servers report 40 percent CPU and the third 95 percent, all behind "
            "one round-robin load balancer. What explanations fit, and which is the most likely?",
            "A screening test finds 90 percent of cases and gives 5 percent false alarms; one "
            "person in two hundred has the condition. How worried should someone with a positive "
            "result be?",
            "Our shop sold 18 percent more umbrellas in the month after we moved them to the "
            "entrance, but it was also the wettest October in ten years. Did the move work?",
            "Is a hash table or a sorted array the better choice for ten thousand keys that are "
            "loaded once and then queried both by exact match and by range?",
            "I slept nine hours and still felt tired three days in a row, after a week of late "
            "coffee and little daylight. Which of the two matters more, and how could I tell?",
            "A recipe for a round cake of 20 cm needs 300 g of flour. How much do I need for a 26 "
            "cm tin of the same height, and should the baking time grow in proportion?",
            "Flights home cost 140 today and usually rise in the last two weeks, but I may have "
            "to change the date, which costs 60. Do I book now or in ten days?",
            "If three machines make three parts in three minutes, how long do one hundred "
            "machines need for one hundred parts? Say where the tempting wrong answer comes from.",
            "Why is the sky still bright for a while after sunset, and why does that twilight "
            "last longer in Norway than in Kenya?",
            "Our team closes fewer tickets since we began code review, yet bug reports have "
            "halved. Are we slower or faster than before?",
            "A friend lends me 500 and asks for 520 back in one month. What yearly interest is "
            "that roughly, and why is four percent times twelve not quite the right answer?",
            "A bag holds four red and six blue marbles and I draw two without putting any back. "
            "What is the chance that they differ in colour?",
            "Washing up by hand takes our family of four 60 litres of warm water a day, and a "
            "dishwasher would use 10 litres per run. Does buying one for 450 pay off?",
            "One candidate has ten years in an older language and learns quickly; the other has "
            "two years in exactly our stack. Whom would you hire for a project of five years?",
            "Moss grows on the north side of most trees in my local wood. Can I rely on it for "
            "direction when I hike in another country?",
            "In cold weather my phone goes from 30 percent battery to off, and indoors it comes "
            "back at 25 percent. Is the battery broken, or is this to be expected?",
            "Every swan on our lake is white, and the guide says that all swans are. What kind of "
            "observation would I need to accept or to reject her claim?",
            "A database query takes 20 ms for a thousand rows, 90 ms for four thousand and 1.5 "
            "seconds for sixteen thousand. What growth does this suggest, and what might cause "
            "it?",
            "Is it faster to cycle 6 km at 18 km/h door to door, or to take a bus that runs every "
            "12 minutes, takes 14 minutes and stops four minutes on foot from each end?",
            "My neighbour says that his garlic spray keeps tigers away, since none has ever come. "
            "What is wrong with the argument, and what would be a fair test?",
            "Ice cubes from boiled water look clearer to me than those straight from the tap. "
            "What could explain it, and how would I check it at home?",
            "We can translate our app into German, with 8 percent of visitors but 20 percent of "
            "revenue, or Spanish, with 22 percent of visitors and 6 percent of revenue. Which "
            "comes first?",
            "A clock loses 4 minutes a day and was set right on Monday at noon. What is the true "
            "time when it shows noon on Friday?",
            "Two studies disagree on whether standing desks help against back pain: one has 2,000 "
            "people who chose their desk, the other 80 who were assigned by lot. Which do I trust "
            "more?",
            "I want to take the paint off the stairs of a house built in 1955 with a heat gun. Is "
            "there a risk that I should test for first?",
        ],
    },
    "task": {
        "system": (
            "You turn a goal into a plan that someone can start on today. Cut it into three to "
            "eight concrete sub-tasks, put them in an order that respects what must come first, "
            "and keep each small enough for one sitting. Answer with one JSON object of this "
            'shape and nothing else: {"steps": [{"do": "The first step, beginning with a verb.", '
            '"depends_on": []}, {"do": "The second step.", "depends_on": [1]}, {"do": "The third '
            'step.", "depends_on": [1, 2]}], "done_when": "One check that anyone could make to '
            'see that the goal is met."} In "depends_on" stand the numbers of the earlier steps '
            "that a step needs."
        ),
        "examples": [
            "I want to move from a two-room flat to a new city in five weeks, with a cat and "
            "without a car. Plan the move.",
            "Add a dark mode to a small React app that has its colours written straight into "
            "thirty components.",
            "Organise a birthday party for nine children in a park next Saturday, with a budget "
            "of 120 and a plan for rain.",
            "Our team needs to bring a Postgres database from version 12 to 16 with less than ten "
            "minutes of downtime.",
            "I have three weeks to prepare for the driving theory test and can study 40 minutes a "
            "day, on weekdays only.",
            "Turn two by three metres of lawn behind the house into a vegetable bed, so that we "
            "can pick salad in June. It is now the middle of March.",
            "My mother leaves hospital on Thursday after a hip operation. Help me prepare her "
            "flat on the second floor for the first two weeks.",
            "Publish my Python command line tool as a package, with tests run on each commit and "
            "a first release that others can install.",
            "Plan four days in Lisbon, coming from Porto by train, for two people who like tiles, "
            "seafood and walking and have 700 altogether.",
            "We want to find out whether the colour of light affects how fast cress grows. Plan "
            "the experiment for a class of 24 over three lessons.",
            "Write a grant application of six pages due in a month, with two co-authors in other "
            "time zones and a budget table that finance has to approve.",
            "Get a dripping kitchen tap fixed in a rented flat, when the landlord rarely answers "
            "and I own one adjustable spanner.",
            "Replace the passwords of a family of four by a password manager, including a "
            "grandmother who writes hers in a notebook.",
            "Scan about 900 paper photographs of my grandparents, with names and dates where they "
            "are known, and share them with cousins abroad.",
            "Our cafe wants to offer oat milk drinks from the first of next month. Cover the "
            "supplier, the prices, the staff and the sign at the counter.",
            "Get me to the finish of a five kilometre run in ten weeks, starting from no exercise "
            "and a knee that hurts on stairs.",
            "Someone pastes a weekly report together from four spreadsheets by hand. Make it a "
            "script that mails the result every Monday at seven.",
            "Teach a new colleague to close the till alone by Sunday; she works three short "
            "evening shifts with me before that.",
            "Renew a passport that runs out in two months, when a trip abroad is booked in nine "
            "weeks and the office gives appointments only online.",
            "Repaint a steel bicycle frame over one long weekend, with a shed but no spray booth.",
            "Find out why our newsletter lost a tenth of its readers this spring and propose what "
            "to change, within five working days.",
            "Build a bird feeder camera from an old phone that saves a picture whenever something "
            "moves and costs no more than 30.",
            "Cook a three course dinner for six on Friday, one guest vegan and one allergic to "
            "nuts, with a single oven and two hours after work.",
            "Split a function of 600 lines that computes invoices into tested parts, while two "
            "colleagues keep adding features to it.",
            "See to it that my father takes five medicines at the right times, when three doctors "
            "prescribe them and he lives alone.",
            "Start a reading group for neighbours in the local library, with a first meeting "
            "within a month and no money to spend.",
            "Have 2,000 pictures of road signs labelled by three volunteers, in such a way that "
            "we know how often they agree.",
            "Settle the affairs of an uncle who died: a bank account, a rented flat, a phone "
            "contract and a car, together with a sister who lives overseas.",
            "Lower the electricity bill of a shared house of five students by a fifth before "
            "winter, without buying new appliances.",
        ],
    },
    "action": {
        "system": (
            "You choose the next action for an assistant that has only the actions named in the "
            "message. Pick exactly one, fill in its arguments from what is known, look before you "
            "change anything, and put a question to the user only if a needed argument is missing "
            "or the step cannot be undone. Answer with one JSON object of this shape and nothing "
            'else: {"action": "its name", "arguments": {"name": "value"}, "why": "One or two '
            'sentences.", "if_it_fails": "What to try next."} In "arguments" stand the name and '
            "value of each argument, or nothing."
        ),
        "examples": [
            'The user says "remind me to call the dentist tomorrow at nine". Available: '
            "create_reminder(text, time), search_contacts(name), ask_user(question).",
            "It is 6:40, the user's train at 7:05 was just cancelled, and she has a meeting in "
            "Leeds at nine. Actions: find_route(from, to, arrive_by), send_message(person, text), "
            "ask_user(question).",
            "A test run ended with one failure out of 212, in test_login.py. You can "
            "read_file(path), run_tests(path), edit_file(path, change) or ask_user(question). "
            "What comes first?",
            "The smoke sensor in the kitchen reports a rising value, and nobody has moved in the "
            "flat for ten minutes. At hand: sound_alarm(room), call_user(text), turn_off(device).",
            'Someone asks "how much did I spend on groceries in March?" and the bank export lies '
            "in march.csv, never opened so far. Tools: read_table(file), sum_column(file, column, "
            "filter), web_search(query).",
            "A customer writes that parcel 88412 should have come on Monday. You may use "
            "track_parcel(number), refund(order) or reply(text). Choose the next one.",
            "The user wants to send the contract to Ana, but the address book has Ana Ruiz and "
            "Ana Petrov. Possible: send_file(file, to), list_recent_messages(person), "
            "ask_user(question).",
            "The disk of the build server is 97 percent full and a release starts in twenty "
            "minutes. You have list_largest(folder), delete(path), page_engineer(text).",
            '"Translate this menu for me" comes with a sharp photo of a Japanese menu. Options: '
            "read_text(image), translate(text, language), ask_for_new_photo(reason).",
            "The thermostat shows 17 degrees, the family returns in an hour, and heating takes "
            "forty minutes to reach 20. Actions: set_temperature(value, at), notify(text), "
            "do_nothing().",
            "In a chess lesson the pupil has just left the queen unprotected on d5, and the tutor "
            "may speak. Tools: show_hint(square), play_move(move), ask_pupil(question).",
            "A hiker asks whether she can still cross the Arlen pass today; it is two in the "
            "afternoon and the forecast is six hours old. Available: get_weather(place, hours), "
            "get_sunset(place), send_advice(text).",
            "Two calendar entries overlap on Tuesday at ten: physiotherapy, and a call with six "
            "people. You can move_event(event, time), propose_times(people), ask_user(question).",
            "The user pastes \"ModuleNotFoundError: No module named 'requests'\" from his script "
            "and asks to get it running. Tools: run_command(line), read_file(path), "
            "explain(text).",
            "A student wants to know at what temperature water boils on a mountain of 3,000 m. "
            "Actions: look_up(property, substance), calculate(expression), answer(text).",
            'Nine messages arrived overnight; number 4, from the school, has the subject "urgent: '
            'early closing today". Choose among open_message(id), summarise(ids), mark_read(ids).',
            'Grandfather says "it is too dark to read in here". It is noon, the blinds are shut '
            "and the ceiling light is at 20 percent. Actions: set_light(percent), open_blinds(), "
            "ask_user(question).",
            "A deployment of version 3.8 finished two minutes ago, and the error rate rose from "
            "0.1 to 4 percent. You may roll_back(version), read_logs(service, minutes) or "
            "wait(minutes).",
            'While driving, the user says "play that song from the film with the sinking ship". '
            "Actions: search_music(query), play(track), ask_by_voice(question).",
            "The pantry has eggs, rice, two tomatoes and an onion, and the user wants dinner in "
            "half an hour without shopping. Tools: find_recipe(ingredients, minutes), "
            "add_to_list(item), order_food(dish).",
            "A hotel in Turin mails that the traveller's room is taken; she is in the air and "
            "lands at 23:10. Choose from call_hotel(name), search_hotels(city, date), "
            "message_traveller(text).",
            "Column C of a spreadsheet shows 1.2E+11 where phone numbers should be. Available: "
            "format_column(column, type), restore_version(date), ask_user(question).",
            "The dog's tracker left the garden four minutes ago and moves along the river path at "
            "walking speed, while the owner's phone is at home. At hand: alert_owner(text), "
            "show_map(device), play_sound(device).",
            'A reader in the library app asks for a novel "like the last one, but shorter". You '
            "can get_loans(user, count), search_catalogue(query, max_pages) or "
            "ask_user(question).",
            'The user dictated "transfer four hundred to Max"; the usual amount to Max is forty. '
            "Tools: make_transfer(to, amount), show_history(person), confirm_with_user(text).",
            "The greenhouse sensor G2 has sent a humidity of exactly 61.0 for six hours while the "
            "temperature changed by twelve degrees. Options: restart_sensor(id), water(minutes), "
            "notify(text).",
            "A customer asks the pharmacy whether her prescription is ready; the record says "
            '"waiting for Dr Bauer" since yesterday. Actions: contact_practice(doctor, text), '
            "tell_customer(text), cancel(prescription).",
            'Before a job interview at two the user asks "what should I know about Halden '
            'Optics?" and it is now noon. Tools: web_search(query), read_notes(topic), '
            "summarise(sources).",
            "The photo library holds 340 very similar pictures of one football match, and the "
            "user asks to free some space. Actions: group_similar(album), delete_photos(ids), "
            "ask_user(question).",
        ],
    },
    "reflection": {
        "system": (
            "You look back at an attempt and its outcome so that the next attempt goes better. "
            "Judge the method rather than the person, tell luck from skill, and draw only lessons "
            "that the story supports. Answer with one JSON object of this shape and nothing else: "
            '{"what_happened": "One sentence.", "keep": "What worked and why.", "change": ["The '
            'first of one to three concrete changes for next time."], "check": "How we shall see '
            'that the change helped."} The list of "change" has one to three items.'
        ),
        "examples": [
            "I prepared for the chemistry exam by rereading my notes for eight hours on the last "
            "day and got 58 percent; a friend who did old exam questions for a week got 85.",
            "We moved the launch forward by two weeks, skipped the load test, and the site was "
            "down for three hours on the first day. Sign-ups still beat the goal.",
            "My sourdough came out flat and sour. I let it rise for twelve hours in a warm summer "
            "kitchen, because twelve hours had been right in January.",
            "I asked my manager for a raise at the end of a meeting about something else. She was "
            "friendly, said she would think about it, and nothing has happened for a month.",
            "To save time I put a clean-up and a bug fix into one commit. The clean-up broke "
            "payments, so we had to take back both.",
            "Our family hike was planned for five hours and took nine; the youngest cried for the "
            "last two, but everybody loved the lake where we stopped for a swim.",
            "I trained a classifier to 99 percent accuracy, and in the factory it missed most "
            "faulty parts. Only one part in a hundred is faulty.",
            "We interviewed five customers before building the export feature and all said they "
            "wanted it. Half a year later three percent have used it.",
            "I ran the first half of the marathon four minutes faster than planned because I felt "
            "great, and had to walk from kilometre 34 on.",
            "The assistant told a user that the museum opens on Mondays without looking it up. He "
            "stood before a closed door and was annoyed.",
            "For once I sorted the shopping list by shelf instead of by recipe. It took ten "
            "minutes longer at home, and I was out of the shop in twenty minutes rather than "
            "forty.",
            "Our book club had eleven people at its first meeting and three at its fourth, after "
            "we had chosen a novel of 700 pages.",
            "I gave a talk of twenty minutes with 48 slides and ran over by nine, so there was no "
            "time for questions; several people asked for the slides afterwards.",
            "My daughter refused to brush her teeth until I let her pick between two brushes. "
            "Since then it has worked on four evenings out of five.",
            "The night shift handed over by word of mouth because the form was too long, and one "
            "patient's physiotherapy was booked twice.",
            "Before two weeks away I set the irrigation timer but never tried it for a full day. "
            "It failed; rain saved the tomatoes, and the basil under the roof died.",
            "We met an outage by restarting every service at once. All was well after six "
            "minutes, but now nobody can say what had failed.",
            "I wrote the neighbours a long mail about our quarrel over the hedge and got a longer "
            "one back; a chat over the fence then settled it in five minutes.",
            "In the lab we measured one sample three times, got 4.1, 4.2 and 6.8, and reported "
            "the average. The reviewer asked why we trusted the last value.",
            "I took the cheapest flight, with 45 minutes to change planes at a huge airport, "
            "missed the second one and paid 180 for a hotel and a new ticket.",
            "The assistant asked four questions before it would set a simple kitchen timer. The "
            "user gave up after the second and used the oven clock.",
            "We had estimated 9,000 for the new kitchen and paid 13,500; two thirds of the "
            "difference came from pipes behind a wall that nobody had looked at.",
            "I practised the piano piece slowly for two weeks and it went well at home, yet "
            "before an audience my hands shook and I had to begin twice.",
            "We tried pair programming for one sprint: fewer tickets were finished, hardly any "
            "came back from testing, and two people said that they were exhausted.",
            "I lent my drill to a colleague without agreeing on a date. It came back after five "
            "months, clean and with chocolates, when I had already bought another.",
            "The charity's letter with a personal story brought 21 replies per thousand, last "
            "year's with statistics 19, and the board wants to drop statistics for good.",
            "I meant to save whatever was left at the end of each month, and for half a year "
            "nothing was. Since April 80 leaves my account on the first, and I hardly notice.",
            "The town hall's chatbot answered 900 questions in its first week, 40 of them "
            "wrongly, and 35 of those were about opening hours on holidays.",
            "I let a new volunteer lead the castle tour after watching me only once. She forgot "
            "two rooms, and the guests rated her higher than anyone this year.",
        ],
    },
    "debug": {
        "system": (
            "You find the cause behind an error or a symptom. Start from the evidence given, name "
            "the most probable cause before the rare ones, and propose a check that costs little "
            "before a fix that costs much. Say so when something may be dangerous and needs a "
            'professional. Answer with one JSON object of this shape and nothing else: {"cause": '
            '"The most probable cause and why.", "verify": "The check, and what it shows if you '
            'are right.", "fix": ["The first step.", "The next step."], "otherwise": "The next '
            'suspect."} The list of "fix" has one step or more.'
        ),
        "examples": [
            "Python raises UnboundLocalError for count inside a function that does count += 1, "
            "although count = 0 stands at the top of the module.",
            "My web page loads on the laptop, but on the phone in the same network "
            'http://localhost:3000 says "connection refused".',
            "The washing machine stops with water in the drum and hums for a minute before it "
            "gives up; it began after I washed trousers with coins in a pocket.",
            'My git push was "rejected (non-fast-forward)" although I committed only a minute '
            "ago. A colleague works on the same branch.",
            "The training loss falls for 300 steps and then becomes NaN. I use float16, a "
            "learning rate of 0.001 and no gradient clipping.",
            "The car clicks when I turn the key and the dashboard goes dim. Yesterday I left the "
            "boot open overnight, with its lamp on.",
            "Our nightly report used to arrive at two, and since the last Sunday of March it "
            "comes at three. The server runs on UTC and nothing was deployed.",
            "After I delete a row of a React list, the input field below shows the text of the "
            "deleted one. The rows are keyed by their index.",
            "The wireless network in the kitchen drops out for about two minutes several times a "
            "day, mostly around meal times.",
            'A docker build fails with "no space left on device" while df shows 40 GB free in my '
            "home folder, which is a partition of its own.",
            "My pizza dough has not risen after three hours. I stirred the yeast into water that "
            "was almost boiling, and the room is at 22 degrees.",
            "SELECT * FROM orders WHERE discount != 10 leaves out the orders without any "
            "discount, which I expected to see.",
            'Logging in to the new server with ssh ends in "Permission denied (publickey)", yet '
            "the same key still works for the old server.",
            "The chain of my bicycle jumps under load, but only on the two smallest sprockets. "
            "The chain is new and the sprockets are six years old.",
            'A C program prints the right answer and then dies with "free(): invalid pointer". It '
            "frees a pointer that a loop has moved forward.",
            "The bedroom radiator is warm at the bottom and cold at the top, and it gurgles in "
            "the evening.",
            "In a spreadsheet SUM gives 0 for prices copied from a web page, and the numbers "
            "stand at the left edge of their cells.",
            "Every call to the weather service has returned 401 since this morning, with a token "
            "I fetched yesterday at six in the evening that is valid for 12 hours.",
            "Printed photos come out much darker than on my screen, both from the printer at home "
            "and from the shop in town.",
            "A DS18B20 temperature sensor on my Raspberry Pi reads 85.0 degrees for the first "
            "second after power-up and 21 from then on.",
            "In our JavaScript shop 0.1 + 0.2 gives 0.30000000000000004, and once in a while an "
            "invoice total is off by a cent.",
            "The cellar smells musty and a white powder grows on the outer wall, most of all "
            "after weeks of rain.",
            "Two threads each add one to a shared counter a million times, and the result is "
            "1,374,212 instead of two million.",
            "Since last night's system update my laptop is hot and slow; the process list shows "
            'one named "indexer" at 180 percent.',
            "My aunt's wireless hearing aids crackle outdoors, but only when her phone is in the "
            "back pocket of her trousers.",
            "Pip installs numpy without complaint, but the notebook raises ModuleNotFoundError on "
            "import numpy. The terminal and the notebook name different Python folders.",
            "Mail from our shop has landed in spam folders since we changed to another mailing "
            "service two weeks ago; sender and text are as before.",
            "The breaker of the kitchen trips whenever kettle and toaster run at once, and never "
            "with either of them alone.",
            "The regular expression <b>.*</b> should find single bold words, but on a line with "
            "two of them it returns everything from the first to the last.",
        ],
    },
    "memory": {
        "system": (
            "You keep the notes of a personal assistant. Either decide what of a conversation or "
            "event is worth remembering (lasting facts, preferences, promises and dates, but no "
            "passing moods, no secrets such as passwords, and nothing that is easy to look up), "
            "or answer a question from the notes given and from nothing else. Answer with one "
            'JSON object of this shape and nothing else: {"remember": ["Each item as one short '
            'sentence, with its date if there is one."], "skip": ["What you leave out and why."], '
            '"answer": "The reply and the note it rests on."} Either list may be empty; "answer" '
            'is "unknown" if the notes do not say, and null if nothing was asked.'
        ),
        "examples": [
            "User: \"I've been vegetarian since January, by the way, and today I'm in a terrible "
            'mood. What could I cook with lentils?" What should be kept?',
            "Notes: Mia starts school on 2 September. Mia is allergic to kiwi. Tom collects "
            "stamps. Question: what must I tell the parents who host Mia at a birthday party?",
            "In today's call Jonas promised the drawings by Friday, Priya will check the budget, "
            "and we talked for ten minutes about football. Note what matters.",
            'User: "My new address is 14 Mill Lane from the first of May; until then post still '
            'goes to Harbour Street." Write the memory entry.',
            'Old note: prefers meetings early in the morning. New message: "Since the baby came, '
            'please nothing before eleven." Which note should remain, and in what words?',
            "While asking how to block a lost card, the user read out its number and the PIN. "
            "What goes into memory?",
            "Notes: the boiler was serviced on 3 March 2024; it needs a service every year; the "
            "fitter is Mr Osei. It is 20 March 2025 and the user asks whether anything is "
            "overdue.",
            "We searched for an hour: the build fails since the compiler flag -O3 breaks one test "
            "on ARM, and -O2 works. Condense this for the next person.",
            'User: "What was the restaurant in Ghent that my sister loved?" Notes: the sister is '
            "called Elin; Elin lives in Ghent; the user dislikes fish.",
            "After the check-up: blood pressure 128 over 82, next visit in six months on 9 "
            "October, and the waiting room was crowded. Keep what will be useful.",
            "A long chat about holidays went from Crete to Iceland to staying home, and ended "
            'with "let\'s decide after the exams on 18 June". What is worth a note?',
            "Notes: Ben's bike has a 56 cm frame; Ben is 1.81 m tall; Ana's bike has 28 inch "
            "wheels. Question: which tyre size does Ben need?",
            "User: \"Forget the piano, I'm going to learn the cello; my first lesson is on Tuesday "
            'at five with Mrs Lindqvist." Update the notes, which say: wants to learn the piano.',
            "A colleague told the user in confidence that she may leave the firm in summer and "
            "asked that it stay between them. Should the assistant store it?",
            "The log of the meeting says: database choice postponed, Karim prefers SQLite, load "
            "figures needed from Oslo by the 12th. Make an entry of at most thirty words.",
            "Notes: the spare key is with the Novaks at number 9; the Novaks are away from 1 to "
            "15 August. It is 6 August and I have locked myself out.",
            "User: \"What's the capital of Mongolia? My son has a geography quiz every Thursday "
            'and is always nervous about it." Keep or skip?',
            "Five times in the last month the user asked for recipes that take under twenty "
            "minutes, always on weekdays. Is this a fact to remember, and how sure is it?",
            "Notes: the safe's code is in the blue folder; the guest network is called Birdhouse; "
            "guests may use it. A visitor asks the speaker for the network and for the safe's "
            "code.",
            "Lab diary of today: sample B leaked, sample C gave 7.3 at 25 degrees, the pH meter "
            "was calibrated at nine, the coffee machine is broken. Shorten it.",
            'Two notes disagree: "Dad takes the blue pill at breakfast" from 2022 and "Dad takes '
            'no pills in the morning" from last week. The nurse asks which is right.',
            'User: "Thanks, that comparison with water pipes made voltage click for me at last; '
            'formulas never do." What does this teach about the person?',
            "On our trip the children loved the tram museum, the hotel breakfast was poor, and "
            "bus 11 took twice as long as the map said. Which of it helps the next visit?",
            "Notes: invoice 204 was sent on 2 May and paid on 30 May; invoice 211 was sent on 14 "
            "May; terms are 30 days. It is 20 June: which one is late, and by how much?",
            'User: "Call me Alex from now on, not Alexander, except in letters to the tax '
            'office." Phrase the note so that it cannot be misread.',
            "A volunteer for our animal shelter is free at weekends, speaks Polish, once met a "
            "famous singer, and is afraid of big dogs. Which facts belong in her record?",
            "Notes: the flight leaves at 6:15 on 7 July from Terminal 2; the taxi needs 50 "
            "minutes; the airline wants us there two hours before. When do we have to leave home?",
            "Film night with friends: three disliked the horror film, Sam cannot read subtitles "
            "without his glasses, and the next one is at Ines's on the 30th. What should be "
            "stored?",
            'User: "Ignore my last message, it was meant for my brother." That message was about '
            "a surprise party for their mother on 21 November. What now?",
        ],
    },
}


def domain_system(domain: str) -> str:
    """The system prompt of a domain; empty where it is none of the six."""
    return DOMAIN_PROMPTS[domain]["system"] if domain in DOMAIN_PROMPTS else ""


def domain_examples(domain: str) -> list[str]:
    """The prompts of one of the six domains.

    Raises:
        ConchError: It is another one.
    """
    if domain not in DOMAIN_PROMPTS:
        raise ConchError(f"domain {domain!r} has no examples: give prompts or data")
    return DOMAIN_PROMPTS[domain]["examples"]
